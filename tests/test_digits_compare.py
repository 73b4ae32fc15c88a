"""The demo that compares networks at equal training compute: the budget, and real digits judged as if they were samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import compare, digits
from models import create_model
from models.checkpoints import describe
from models.macs import multiply_accumulates, training_multiply_accumulates
from models.registry import model_config
from runtime.files import write_json

STEPS = {"EDT-Ti/2": (90, 100), "SiT-Ti/2": (89, 98)}
CONTENDERS = {"EDT-Ti/2": {}, "DiT-Ti/2": {}, "MDTv2-Ti/2": {}, "SiT-Ti/2": {"mediator_num": 16}}


def steps(capsys, model: str, settings: dict, gmac: float, batch_size: int = 32) -> int:
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    compare.main(["steps", "--model", model, *flags, "--batch-size", str(batch_size), "--budget-gmac", str(gmac)])
    return int(capsys.readouterr().out)


def test_equal_compute_within_a_step(capsys):
    """Of each network as it was published: EDT and MDTv2 with the masked pass."""
    budget, numbers = 1000, {}
    for model, settings in CONTENDERS.items():
        masked = model.startswith(("EDT", "MDT"))
        a_step = 32 * training_multiply_accumulates(model_config(model, **settings), masked) / 1e9
        numbers[model] = steps(capsys, model, settings, budget)
        assert budget - a_step < numbers[model] * a_step <= budget
    assert len(set(numbers.values())) == len(CONTENDERS)  # they cost differently


def test_steps_by_hand(capsys):
    """A DiT's step is three forward passes, but for the input's gradient in the first of its products, the patch embedding and
    the timestep's."""
    config = model_config("DiT-Ti/2")
    first = 64 * 12 * 96 + 256 * 96
    a_step = 16 * (3 * multiply_accumulates(config) - first) / 1e9
    assert steps(capsys, "DiT-Ti/2", {}, 7.001 * a_step, 16) == 7
    assert steps(capsys, "DiT-Ti/2", {}, 6.999 * a_step, 16) == 6


def test_a_budget_below_one_step(fails):
    error = fails(compare.main, "steps", "--model", "DiT-Ti/2", "--batch-size", "32", "--budget-gmac", "1")
    assert "--budget-gmac 1.0 does not allow one step of 32 images" in error


def checkpoint(path: Path, model: str, settings: dict, masked: bool) -> None:
    network = create_model(model, **settings)
    config = describe(model, network.config, codec={"name": "pixels", "scale": 1.0, "image_size": 16}, class_names=())
    path.parent.mkdir(parents=True, exist_ok=True)
    args = {"masked": masked, "global_batch_size": 8}
    torch.save({"ema": network.state_dict(), "config": config, "step": int(path.stem), "args": args}, path)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two networks' checkpoints at two steps, of equal compute. The samples: real digits but for EDT's first, which are
    inverted and have wrong labels."""
    digits.prepare(tmp_path / "digits")
    paths = sorted((tmp_path / "digits" / "train").rglob("*.png"))
    paths = [paths[i] for i in np.random.default_rng(1).permutation(len(paths))[:400]]  # at random: neighbours share a writer
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = np.array([int(path.parent.name) for path in paths])
    folders = [tmp_path / name for name in ("edt", "sit")]
    (folders[0] / "000-killed" / "checkpoints").mkdir(parents=True)  # a run that was killed before its first checkpoint
    for folder, model in zip(folders, ("EDT-Ti/2", "SiT-Ti/2"), strict=True):
        for step in STEPS[model]:
            name = f"{step:07d}"
            checkpoint(folder / "001-run" / "checkpoints" / f"{name}.pt", model, CONTENDERS[model], model.startswith("EDT"))
            wrong = model.startswith("EDT") and step == 90
            (folder / "samples" / name).mkdir(parents=True)
            settings = {"sampler": "SDE", "num_steps": 50} if model.startswith("SiT") else {"num_sampling_steps": 40}
            write_json({"sampler": "ancestral", **settings}, folder / "samples" / name / "settings.json")
            np.savez(
                folder / "samples" / name / "samples_400x16x16x3.npz",
                arr_0=255 - images if wrong else images, arr_1=(labels + wrong) % 10,
            )  # fmt: skip
    return folders


def argv(folders: list[Path]) -> list[str]:
    root = folders[0].parent
    return ["report", "--data", str(root / "digits"), "--runs", *map(str, folders), "--out", str(root)]


def test_report(runs, tmp_path, capsys):
    compare.main(argv(runs))
    figures = json.loads((tmp_path / "metrics_compare.json").read_text())
    edt, sit = figures["networks"]
    assert (edt["model"], sit["model"]) == ("EDT-Ti/2", "SiT-Ti/2 M=16")
    for network, model in ((edt, "EDT-Ti/2"), (sit, "SiT-Ti/2")):
        config, masked = model_config(model, **CONTENDERS[model]), network is edt
        a_step = 8 * training_multiply_accumulates(config, masked) / 1e9
        assert [point["step"] for point in network["checkpoints"]] == list(STEPS[model])
        assert [point["training_gmac"] for point in network["checkpoints"]] == pytest.approx([k * a_step for k in STEPS[model]])
        calls = 40 if network is edt else 50
        assert network["gmac_a_sample"] == pytest.approx(calls * multiply_accumulates(config) / 1e9)
    assert edt["parameters"] > sit["parameters"] > 700_000
    wrong, *right = edt["checkpoints"] + sit["checkpoints"]
    assert wrong["label_agreement"] < 0.3 and wrong["frechet_ratio"] > 10
    for point in right:
        assert point["label_agreement"] >= 0.99 and 0.75 < point["frechet_ratio"] < 1.33
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width > 2 * picture.height
    shown = capsys.readouterr().out
    assert "SiT-Ti/2 M=16" in shown and "1/2" in shown and "2/2" in shown


def test_what_is_missing_is_named(runs, fails):
    [samples] = (runs[1] / "samples" / "0000089").glob("*.npz")
    samples.unlink()
    assert "sit/samples/0000089 must hold one samples_*.npz" in fails(compare.main, *argv(runs))
    checkpoints = runs[1] / "001-run" / "checkpoints"
    (checkpoints / "0000089.pt").unlink()
    error = fails(compare.main, *argv(runs))
    assert "different numbers of checkpoints" in error and "edt 2" in error and "sit 1" in error
    (checkpoints / "0000098.pt").unlink()
    assert "sit must hold the checkpoints of one run" in fails(compare.main, *argv(runs))


def test_unequal_compute_is_refused(runs, fails):
    old = runs[1] / "001-run" / "checkpoints" / "0000098.pt"
    old.rename(old.with_name("0000102.pt"))
    samples = runs[1] / "samples"
    (samples / "0000098").rename(samples / "0000102")
    error = fails(compare.main, *argv(runs))
    assert "trained with different compute" in error and "edt 72" in error and "sit 75" in error
