"""The demos' verdicts: costs worked out by hand, and real digits judged as if they were samples."""

import json

import numpy as np
import pytest
from PIL import Image

from examples import digits, switching
from models.checkpoints import build_model, read_checkpoint
from models.macs import multiply_accumulates
from tests.sit_checkpoints import random_checkpoint

# Image 0 leaves both models, image 1 only the first, image 2 none; guidance doubles the 10 calls of each.
TABLE = """image,label,switch_1_to_2,switch_2_to_3,evaluations_1,evaluations_2,evaluations_3,gmac
0,0,4,6,8,4,8,0
1,1,7,-1,14,6,0,0
2,2,-1,-1,20,0,0,0
"""


@pytest.fixture
def switched(tmp_path):
    ckpts = [random_checkpoint(tmp_path / f"{m}.pt", mediator_num=m) for m in (1, 4, 16)]
    table = tmp_path / "switch_steps.csv"
    table.write_text(TABLE)
    return table, ckpts


def test_costs_of_switching_by_hand(switched):
    table, ckpts = switched
    a, b, c = (multiply_accumulates(build_model(read_checkpoint(path)).config) / 1e9 for path in ckpts)
    assert a < b < c
    costs = switching.measure_switching(table, ckpts)
    assert costs["step_wise"]["gmac_an_image"] == pytest.approx((42 * a + 10 * b + 8 * c) / 3)
    assert costs["step_wise"]["gmac_a_call"] == pytest.approx((42 * a + 10 * b + 8 * c) / 60)
    assert costs["last_alone"] == {"gmac_a_call": pytest.approx(c), "gmac_an_image": pytest.approx(20 * c)}
    assert [model["mediators"] for model in costs["models"]] == [1, 4, 16]
    assert [model["share_of_calls"] for model in costs["models"]] == pytest.approx([42 / 60, 10 / 60, 8 / 60])
    assert [model["share_of_images_that_leave"] for model in costs["models"]] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [model["mean_last_step"] for model in costs["models"]] == [5.5, 6.0, None]


def test_report_on_real_digits(switched, tmp_path, capsys):
    """Training images are read as their label, lie as far from the held-out ones as any, and are exact copies."""
    table, ckpts = switched
    digits.prepare(tmp_path / "digits")
    paths = sorted((tmp_path / "digits" / "train").rglob("*.png"))
    paths = [paths[i] for i in np.random.default_rng(1).permutation(len(paths))[:400]]  # at random: neighbours share a writer
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = np.array([int(path.parent.name) for path in paths])
    np.savez(tmp_path / "real.npz", arr_0=images, arr_1=labels)
    np.savez(tmp_path / "wrong.npz", arr_0=255 - images, arr_1=(labels + 1) % 10)
    switching.main(
        ["--data", str(tmp_path / "digits"), "--samples", str(tmp_path / "real.npz"), "--samples-last",
         str(tmp_path / "wrong.npz"), "--switch-steps", str(table), "--ckpts", *map(str, ckpts), "--out", str(tmp_path)]
    )  # fmt: skip
    figures = json.loads((tmp_path / "metrics_mediators.json").read_text())
    real, wrong = figures["step_wise"], figures["last_alone"]
    assert real["label_agreement"] >= 0.99 and wrong["label_agreement"] < 0.3
    assert 0.75 < real["frechet_ratio"] < 1.33 and wrong["frechet_ratio"] > 10
    assert real["median_distance_to_training"] < 1e-6 < figures["median_distance_of_held_out_to_training"]
    assert real["gmac_a_call"] < wrong["gmac_a_call"]
    shown = capsys.readouterr().out
    assert "wanted of step-wise" in shown and "M = 16" in shown
    with Image.open(tmp_path / "samples_switching.png") as sheet:
        assert sheet.height == 10 * (64 + 2) - 2 and sheet.width > 10 * (64 + 2) - 2
