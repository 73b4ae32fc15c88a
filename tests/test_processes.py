"""Two and three processes, over gloo: what they make is what one makes, and where one fails all end with its error.

The scripts under torchrun and accelerate themselves are in test_seed_commands.py.
"""

import csv
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import edt_checkpoints
from tests.launch import run_job
from tests.runs import be_killed, final_state, in_own_step, metrics, train_argv
from tests.sit_checkpoints import random_checkpoint

SEVERAL = pytest.mark.parametrize("processes", [2, 3])


# Training


def training(store: Path, results: Path, *extra: str) -> list[str]:
    return train_argv(store, results, "--global-batch-size", "6", "--log-every", "1", *extra)


@pytest.fixture(scope="module")
def trained_by_one(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("one")
    run_job("train_mask_adan", training(latent_store, results), 1)
    return results


def assert_near(results: Path, expected: Path) -> float:
    """Within what the order of sums changes; the largest difference of a weight. Adan divides by the gradient's size, which
    enlarges the rounding of tiny gradients."""
    for a, b in zip(metrics(results), metrics(expected), strict=True):
        assert a == pytest.approx(b, rel=1e-4), (a, b)
    a, b = final_state(results), final_state(expected)
    differences = [(a[which][key] - b[which][key]).abs().max().item() for which in ("model", "ema") for key in a["model"]]
    assert max(differences) < 1e-4
    np.testing.assert_allclose(a["sampler"]["history"], b["sampler"]["history"], rtol=1e-3)
    return max(differences)


@SEVERAL
def test_training(latent_store, trained_by_one, tmp_path, processes, record_property):
    run_job("train_mask_adan", training(latent_store, tmp_path), processes)
    record_property("largest difference of a weight", assert_near(tmp_path, trained_by_one))


def test_training_resumed_by_other_numbers_of_processes(latent_store, trained_by_one, tmp_path):
    for processes in (1, 2, 3):
        flags = ("--max-steps", str(2 * processes), "--resume", "auto")
        run_job("train_mask_adan", training(latent_store, tmp_path, *flags), processes)
    assert_near(tmp_path, trained_by_one)


# Extraction


@SEVERAL
def test_extraction(image_folder, tiny_vae, tmp_path, processes):
    """The published extraction let every rank overwrite the others' files."""
    flags = [
        "--data-path",
        image_folder,
        "--vae",
        tiny_vae,
        "--image-size",
        32,
        "--batch-size",
        3,
        "--flip",
        "--num-workers",
        0,
    ]
    for count in (1, processes):
        ended = run_job("extract_features", [*flags, "--features-path", tmp_path / str(count)], count)
        assert ended.stdout.count("14 images") == 1
    for name in ("latents.npy", "latents_flipped.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / str(processes) / name).read_bytes(), name


# Sampling


@pytest.fixture(scope="module")
def edt(tmp_path_factory) -> Path:
    return edt_checkpoints.random_checkpoint(tmp_path_factory.mktemp("edt") / "0000001.pt")


@pytest.fixture(scope="module")
def sits(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sits")
    return [random_checkpoint(folder / f"{m}.pt", seed=m, mediator_num=m) for m in (1, 4, 16)]


def sampled(script: str, flags: list, folder: Path, processes: int) -> np.ndarray:
    """Seven images in batches of three, whichever process makes them: the same in every bit."""
    count = ["--sample-dir", folder, "--num-fid-samples", "7", "--per-proc-batch-size", "3", "--no-png"]
    run_job(script, [*flags, *count], processes)
    return np.load(folder / "samples_7x16x16x3.npz")["arr_0"]


@pytest.mark.parametrize(
    "flags",
    [
        None,
        ["SDE", "--num-sampling-steps", "6"],
        ["ODE", "--sampling-method", "heun", "--num-sampling-steps", "6"],
        ["ODE", "--per-sample-solver"],
    ],
    ids=["gaussian", "sde", "ode-heun", "ode-dopri5-per-sample"],
)
def test_sampling(edt, sits, tmp_path, flags):
    if flags is None:
        script, flags = "sample_ddp", ["--ckpt", edt, "--num-sampling-steps", "4", "--cfg-scale", "2"]
    else:
        script, flags = "attention_mediator.sample_ddp", [*flags, "--ckpt", sits[1]]
    one, two, three = (sampled(script, flags, tmp_path / str(count), count) for count in (1, 2, 3))
    assert one.std() > 10
    assert np.array_equal(one, two) and np.array_equal(one, three)


# The changes of an ODE hardly shrink with random weights.
@pytest.mark.parametrize(
    "flags",
    [
        ["SDE", "--switch-ratio1", "0.83", "--switch-ratio2", "0.62"],
        ["ODE", "--sampling-method", "ab2", "--switch-ratio1", "0.999", "--switch-ratio2", "0.95"],
    ],
    ids=["sde", "ode"],
)
def test_switching(sits, tmp_path, flags):
    stages = [part for i, path in enumerate(sits, start=1) for part in (f"--ckpt{i}", path)]
    flags = [*flags, *stages, "--num-sampling-steps", "12", "--first-several-num", "2"]
    images, tables = {}, {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        images[count] = sampled("time_step_wise_adjusting.sample_ddp_three", flags, folder, count)
        with open(folder / "switch_steps.csv") as file:
            tables[count] = list(csv.DictReader(file))
    assert tables[1] == tables[2] == tables[3]
    assert len({(row["switch_1_to_2"], row["switch_2_to_3"]) for row in tables[1]}) > 1, "nothing is tested"
    assert np.array_equal(images[1], images[2]) and np.array_equal(images[1], images[3])


# Evaluation


def test_evaluation(tmp_path):
    """Every digit: the batches are the same ones, whoever measures them."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", rng.integers(0, 200, (45, 6, 6, 3), np.uint8))
    np.savez(tmp_path / "samples.npz", rng.integers(30, 256, (37, 6, 6, 3), np.uint8))
    flags = ["--features", "pixels", "--batch-size", "4", "--kid", "--kid-subset-size", "20"]
    results = {}
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.json"
        files = [tmp_path / "ref.npz", tmp_path / "samples.npz", "--json", path]
        ended = run_job("evaluations.evaluator", [*files, *flags], count)
        results[count] = json.loads(path.read_text()), ended.stdout
    assert results[1] == results[2] == results[3]
    assert np.isfinite(results[1][0]["fid"])


# Failures


def run_out_of_memory(_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def have_a_bug(_) -> None:
    raise TypeError("a bug")


@pytest.mark.parametrize(
    ("act", "error", "code"),
    [
        (run_out_of_memory, "process 1 of 3: the device ran out of memory: lower the batch size", 1),
        (be_killed, "lost another process of this job (killed? out of memory?): ", -9),
        (have_a_bug, None, 1),
    ],
)
def test_a_process_that_fails_in_training_ends_all(latent_store, tmp_path, act, error, code):
    """The others printed tracebacks of closed connections, or waited for the failed one for half an hour."""
    argv = training(latent_store, tmp_path)
    ended = run_job("train_mask_adan", argv, 3, prepare=functools.partial(in_own_step, 3, (1,), act), expect=None)
    assert ended.codes == [1, code, 1]
    if error:
        assert len(ended.errors) == 1 and error in ended.errors[0], ended.stderr
        assert "Traceback" not in ended.stderr
    else:
        assert ended.stderr.count("Traceback") == 1 and "TypeError: a bug" in ended.stderr and not ended.errors
    assert "[rank0]" not in ended.stderr and "[rank2]" not in ended.stderr


@pytest.fixture
def with_a_bad_image(image_folder, tmp_path) -> Path:
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "cat" / "4.png").write_text("not an image")
    return images


def test_an_unreadable_image_ends_training_with_its_name(with_a_bad_image, tmp_path):
    flags = ["--model", "SiT-Ti/2", "--vae", "pixels", "--image-size", "16", "--num-workers", "0", "--epochs", "1"]
    argv = [*flags, "--data-path", with_a_bad_image, "--results-dir", tmp_path / "runs", "--global-batch-size", "4"]
    ended = run_job("attention_mediator.train", argv, 2, expect=1)
    (error,) = ended.errors
    assert "of 2: cannot read the image" in error and "4.png" in error and "Traceback" not in ended.stderr


def test_an_unreadable_image_ends_an_extraction_whose_other_process_waits(with_a_bad_image, tmp_path):
    """No collective fails here: the first process looks at the other's progress until all rows are there."""
    flags = ["--features-path", tmp_path / "store", "--vae", "pixels", "--image-size", "16", "--batch-size", "2"]
    ended = run_job("extract_features", ["--data-path", with_a_bad_image, *flags, "--num-workers", "0"], 2, expect=1)
    (error,) = ended.errors
    assert error.startswith("error: process 1 of 2: cannot read the image") and "4.png" in error
    assert "Traceback" not in ended.stderr
