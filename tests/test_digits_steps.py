"""The demo of few steps: which calls it makes, and what it reports of real measurements."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from examples import digits, steps
from models.checkpoints import read_checkpoint
from models.macs import multiply_accumulates
from tests.edt_checkpoints import random_checkpoint as random_edt_checkpoint
from tests.sit_checkpoints import random_checkpoint

SOLVERS = {steps.GAUSSIAN: ("dpm++2m", "heun"), steps.TRANSPORT: ("ab2",)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Everything measured with at most 3 or 6 calls, 12 images each."""
    place = tmp_path_factory.mktemp("steps")
    digits.prepare(place / "digits")
    edt, guide = (random_edt_checkpoint(place / f"{name}.pt", seed) for seed, name in enumerate(("edt", "guide")))
    sit = random_checkpoint(place / "sit.pt", mediator_num=4)
    argv = ["measure", "--data", place / "digits", "--ckpt", edt, "--guide-ckpt", guide, "--transport-ckpt", sit,
            "--num-images", "12", "--out", place / "steps"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "SOLVERS", SOLVERS)
        patch.setattr(steps, "CALLS", (3, 6))
        patch.setattr(steps, "GUIDED_EVALUATIONS", (3,))
        patch.setattr(steps, "REFERENCES", {steps.TRANSPORT: ("SDE", ("--mode", "SDE"), 5)})
        steps.main([*map(str, argv)])
        yield place, [str(part) for part in argv], edt, sit


def test_measure_and_report(measured, capsys):
    place, argv, edt, sit = measured
    written = {path: path.stat().st_mtime_ns for path in (place / "steps").iterdir()}
    steps.main(argv)  # nothing is measured twice
    assert written == {path: path.stat().st_mtime_ns for path in (place / "steps").iterdir()}
    steps.main(["report", "--measured", str(place / "steps"), "--out", str(place)])
    panels = json.loads((place / "metrics_steps.json").read_text())
    cost = {name: multiply_accumulates(read_checkpoint(path).config) / 1e9 for name, path in (("edt", edt), ("sit", sit))}
    calls = {}
    for panel, lines in panels.items():
        for name, points in lines.items():
            calls[name] = [point["calls"] for point in points]
            for point in points:
                gmac = cost["sit" if panel == steps.TRANSPORT else "edt"]
                assert point["gmac"] == pytest.approx(point["calls"] * gmac)
                assert len(point["seeds"]) == 3 and len({seed["frechet"] for seed in point["seeds"]}) == 3
    assert calls["dpm++2m"] == [3, 6] and calls["heun"] == [3, 5]  # Heun: an odd number
    assert calls["SDE"] == [5]
    assert calls["constant"] == calls["autoguidance"] == [6]
    assert 3 < calls["interval"][0] < 6
    frechet = {name: points[0]["seeds"][0]["frechet"] for name, points in panels[steps.GUIDANCE].items()}
    assert len(set(frechet.values())) == len(frechet) == 5  # without guidance, and with each
    with Image.open(place / "steps.png") as picture:
        assert picture.width > picture.height
    assert "autoguidance" in capsys.readouterr().out


def test_processes_share_the_calls_evenly():
    settings = [steps.Setting(steps.GAUSSIAN, str(calls), (), calls) for calls in (1, 9, 2, 3, 5)]
    shares = steps.even_shares(settings, 2)
    assert sorted(sum(setting.cost for setting in share) for share in shares) == [10, 10]
    assert sorted(setting.name for share in shares for setting in share) == ["1", "2", "3", "5", "9"]


def test_confidence_interval_is_students():
    values = np.array([0.91, 0.94, 0.98])
    mean, half = steps.summarize({"seeds": [{"key": value} for value in values]}, "key")
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-4)


def test_figures_of_other_checkpoints_are_not_taken(measured, fails):
    _, argv, *_ = measured
    swapped = [*argv]
    a, b = (swapped.index(flag) + 1 for flag in ("--ckpt", "--guide-ckpt"))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert "holds figures of other checkpoints or settings" in fails(steps.main, *swapped)


def test_a_missing_measurement_is_named(measured, tmp_path, fails):
    place, *_ = measured
    shutil.copytree(place / "steps", tmp_path / "steps")
    (tmp_path / "steps" / "transport-ab2-6.json").unlink()
    error = fails(steps.main, "report", "--measured", str(tmp_path / "steps"), "--out", str(place))
    assert "transport-ab2-6.json is missing" in error


def test_too_few_calls_for_a_solver(measured):
    _, _, edt, _ = measured
    with pytest.raises(ValueError, match=r"at most 1 network calls.* at least 3 steps"):
        steps.steps_within(["--ckpt", str(edt), "--solver", "dpm++2m"], read_checkpoint(edt), 1)
