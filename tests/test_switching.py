"""Step-wise switching as the scripts do it: from checkpoints to images and switch_steps.csv."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints import build_model, read_checkpoint
from models.macs import multiply_accumulates
from sampling import calibrate_switch
from sampling.calibrate_switch import Trajectories, calls_before, ratio_for, share_of_calls
from tests.launch import run_script
from tests.shared import grey_levels
from tests.sit_checkpoints import random_checkpoint, sample
from time_step_wise_adjusting import sample_ddp_three

NAME = "samples_6x16x16x3.npz"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stages")
    return [random_checkpoint(folder / f"{m}.pt", seed=m, mediator_num=m) for m in (1, 4, 16)]


# The changes of an ODE hardly shrink with random weights.
ODE = ("--sampling-method", "ab2", "--switch-ratio1", "0.999", "--switch-ratio2", "0.95")


def flags(checkpoints: list[Path]) -> list[str]:
    return [part for i, path in enumerate(checkpoints, start=1) for part in (f"--ckpt{i}", str(path))]


def argv(checkpoints: list[Path], folder: Path, *extra: str) -> list[str]:
    return [
        *flags(checkpoints), "--sample-dir", str(folder), "--num-fid-samples", "6", "--num-sampling-steps", "12",
        "--first-several-num", "2", "--switch-ratio1", "0.83", "--switch-ratio2", "0.62", *extra,
    ]  # fmt: skip


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "switch_steps.csv") as file:
        return list(csv.DictReader(file))


def three(mode: str, checkpoints: list[Path], folder: Path, *extra: str) -> tuple[np.ndarray, list[dict[str, str]]]:
    sample_ddp_three.main([mode, *argv(checkpoints, folder, *extra)])
    return np.load(folder / NAME)["arr_0"], table(folder)


@pytest.mark.parametrize(
    ("mode", "extra"),
    [("SDE", ()), ("SDE", ("--cfg-scale", "2")), ("SDE", ("--sampling-method", "Heun")), ("ODE", ODE)],
    ids=["sde", "cfg", "heun", "ode-ab2"],
)
def test_any_batch_size_gives_each_image_what_batch_size_1_gives_it(checkpoints, tmp_path, mode, extra):
    alone, alone_table = three(mode, checkpoints, tmp_path / "1", *extra, "--per-proc-batch-size", "1")
    together, together_table = three(mode, checkpoints, tmp_path / "6", *extra, "--per-proc-batch-size", "6")
    assert alone_table == together_table
    assert grey_levels(alone, together) <= 1
    steps = [(row["switch_1_to_2"], row["switch_2_to_3"]) for row in alone_table]
    assert len(set(steps)) > 1, f"the images all switch at {steps[0]}: nothing is tested"


def test_two_processes_and_a_restart_switch_alike(checkpoints, tmp_path):
    images, rows = three("SDE", checkpoints, tmp_path / "one")
    script = "time_step_wise_adjusting/sample_ddp_three.py"
    done = run_script(script, "SDE", *argv(checkpoints, tmp_path / "two"), processes=2)
    assert table(tmp_path / "two") == rows and grey_levels(np.load(tmp_path / "two" / NAME)["arr_0"], images) <= 1
    assert done.stdout.count("GMAC a call on average") == 1
    again, _ = three("SDE", checkpoints, tmp_path / "one")  # all is there: the report is made from the table
    assert np.array_equal(again, images)


def test_the_table_adds_up(checkpoints, tmp_path):
    _, rows = three("SDE", checkpoints, tmp_path, "--cfg-scale", "1.5")
    cost = [multiply_accumulates(build_model(read_checkpoint(path)).config) / 1e9 for path in checkpoints]
    assert cost == sorted(cost) and cost[0] < cost[-1]
    for i, row in enumerate(rows):
        evaluations = [int(row[f"evaluations_{stage}"]) for stage in (1, 2, 3)]
        first, second = int(row["switch_1_to_2"]), int(row["switch_2_to_3"])
        ends = [11 if step < 0 else step for step in (first, second)]
        last = [second < 0 and first < 0, second < 0 <= first, second >= 0]  # who takes the last step
        expected = [ends[0] + last[0], ends[1] - ends[0] + last[1], 11 - ends[1] + last[2]]
        assert evaluations == [2 * calls for calls in expected] and sum(evaluations) == 24
        assert float(row["gmac"]) == pytest.approx(np.dot(evaluations, cost), rel=1e-6)
        assert int(row["image"]) == i


def test_one_model_is_the_static_sampler(checkpoints, tmp_path):
    sample_ddp_three.main(
        ["SDE", "--ckpts", str(checkpoints[1]), "--sample-dir", str(tmp_path / "one"), "--num-fid-samples", "5",
         "--num-sampling-steps", "6"]
    )  # fmt: skip
    static = sample("SDE", checkpoints[1], tmp_path / "static")
    assert grey_levels(np.load(tmp_path / "one" / "samples_5x16x16x3.npz")["arr_0"], static) <= 1


def test_shares_of_highest_entropy():
    cost = np.array([1.0, 2.0, 4.0])
    shares = share_of_calls(cost, 2.5)
    assert shares.sum() == pytest.approx(1) and shares @ cost == pytest.approx(2.5)
    # Lagrange: the logarithms are linear in the cost.
    slopes = np.diff(np.log(shares)) / np.diff(cost)
    assert slopes[0] == pytest.approx(slopes[1])
    assert share_of_calls(cost, cost.mean()) == pytest.approx(np.full(3, 1 / 3))
    for budget in (1.0, 4.5):
        with pytest.raises(ValueError, match=f"--budget-gmac {budget} is out of reach"):
            share_of_calls(cost, budget)


def test_ratio_for_a_share_of_the_calls(rng):
    """Changes that fall linearly from 1 to 0: a ratio r is met after about (1 - r) of the steps."""
    steps = 200
    changes = np.linspace(1, 0, steps - 1) * np.ones((8, 1)) + rng.uniform(0, 1e-6, (8, steps - 1))
    run = Trajectories(changes, np.ones(steps + 1), np.array([1.0]))
    for share in (0.2, 0.5, 0.9):
        ratio = ratio_for(run, share, 3)
        assert ratio == pytest.approx(1 - share, abs=0.02)
        assert calls_before(run, ratio, 3) == pytest.approx(share, abs=0.01)


def test_calibration_meets_the_budget(checkpoints, tmp_path, capsys):
    cost = [multiply_accumulates(build_model(read_checkpoint(path)).config) / 1e9 for path in checkpoints]
    budget = 0.5 * cost[0] + 0.5 * cost[-1]
    common = ["SDE", *flags(checkpoints), "--num-sampling-steps", "60", "--first-several-num", "2"]
    calibrate_switch.main([*common, "--budget-gmac", str(budget), "--num-samples", "6"])
    proposal = capsys.readouterr().out.splitlines()[-1].split()
    assert proposal[0] == "--switch_ratio1" and proposal[2] == "--switch_ratio2"
    folder = ["--sample-dir", str(tmp_path / "out"), "--num-fid-samples", "6"]
    sample_ddp_three.main([*common, *folder, *proposal])  # the same images as the calibration's
    rows = table(tmp_path / "out")
    evaluations = sum(int(row[f"evaluations_{stage}"]) for row in rows for stage in (1, 2, 3))
    average = sum(float(row["gmac"]) for row in rows) / evaluations
    assert abs(average - budget) < 0.1 * (cost[-1] - cost[0])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--switch-ratio1", "0.1"), "in the wrong order.*did you mean"),
        (("--mediator-num2", "16"), r"--mediator-num2 16: .*4\.pt has 4"),
        (("--image-size", "256"), "--image-size 256: .* has 16"),
    ],
)
def test_bad_input(checkpoints, tmp_path, fails, extra, message):
    error = fails(sample_ddp_three.main, "SDE", *argv(checkpoints, tmp_path / "out"), *extra)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_go_together(checkpoints, tmp_path, fails):
    other = {
        "another size": random_checkpoint(tmp_path / "size.pt", mediator_num=16, input_size=32),
        "classes": random_checkpoint(tmp_path / "classes.pt", mediator_num=16, num_classes=3),
        "another path": random_checkpoint(
            tmp_path / "path.pt", mediator_num=16, objective={"name": "transport", "path_type": "GVP", "prediction": "velocity"}
        ),
    }
    words = {"another size": "input_size", "classes": "num_classes", "another path": "path_type"}
    for what, path in other.items():
        error = fails(sample_ddp_three.main, "SDE", *argv([*checkpoints[:2], path], tmp_path / "out"))
        assert words[what] in error, error
    error = fails(sample_ddp_three.main, "ODE", *argv(checkpoints, tmp_path / "out"), "--sampling-method", "dopri5")
    assert "dopri5" in error and "euler" in error
