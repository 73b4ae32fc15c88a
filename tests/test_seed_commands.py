"""The command lines of the published EDT README, with paths, sizes and process counts replaced, and nothing else; ports are
free ones, pixels stand for the VAE, and a random network for Inception, which tests do not have."""

import numpy as np
import pytest

from tests.launch import ROOT, free_port, run_command

TORCHRUN = ("torchrun", "--nnodes=1", "--nproc_per_node=2")
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("seed")


@pytest.fixture(scope="module")
def checkpoint(place, image_folder):
    """The README's extraction and training lines, one after the other."""
    run_command(
        *TORCHRUN, f"--master_port={free_port()}", "extract_features.py",
        "--data-path", image_folder, "--features-path", place / "features", "--vae", "pixels", "--image-size", "16",
    )  # fmt: skip
    done = run_command(
        *ACCELERATE, str(free_port()), "train_mask_adan.py",
        "--results-dir", place / "runs", "--model", "EDT-S/2", "--init-lr", "1e-3", "--feature-path", place / "features",
        "--epochs", "1", "--global-batch-size", "4", "--log-every", "1",
    )  # fmt: skip
    assert "step       3" in done.stdout  # 14 images, one epoch of batch 4, and both processes share one run
    return place / "runs" / "000-EDT-S-2" / "checkpoints" / "latest"


@pytest.mark.parametrize("guidance", [[], ["--cfg-scale", "2"]], ids=["plain", "cfg"])
def test_sample_and_evaluate(checkpoint, place, image_folder, guidance, inception_weights, monkeypatch):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(inception_weights))
    samples = place / f"samples{len(guidance)}"
    run_command(
        *TORCHRUN, f"--master_port={free_port()}", "sample_ddp.py", "--model",
        "EDT-S/2", "--amm", "True", "--sample-dir", samples, *guidance, "--num-fid-samples", "6", "--ckpt", checkpoint,
        "--num-sampling-steps", "2",
    )  # fmt: skip
    assert np.load(samples / "samples_6x16x16x3.npz")["arr_0"].shape == (6, 16, 16, 3)
    reference = place / "reference.npz"
    run_command("python", "evaluations/reference.py", image_folder, reference, "--image-size", "16", "--no-statistics")
    done = run_command("python", "evaluator.py", reference, samples / "samples_6x16x16x3.npz", cwd=ROOT / "evaluations")
    titles, numbers = zip(*(line.split(": ") for line in done.stdout.splitlines()), strict=True)
    assert titles == ("Inception Score", "FID", "sFID", "Precision", "Recall")
    assert np.isfinite([float(number.removesuffix(" (inception of random.pth)")) for number in numbers]).all()
