"""Checkpoints of small SiTs with random weights, and images from them."""

from pathlib import Path

import numpy as np
import torch

from attention_mediator import sample_ddp
from models import create_model
from models.checkpoints import describe
from tests.shared import perturb

TRANSPORT = {"name": "transport", "path_type": "Linear", "prediction": "velocity"}


def random_checkpoint(path: Path, *, objective: dict = TRANSPORT, seed: int = 0, **settings) -> Path:
    """A SiT-Ti/2 whose every block contributes."""
    torch.manual_seed(seed)
    model = perturb(create_model("SiT-Ti/2", **settings), 0.05)
    config = describe(
        "SiT-Ti/2", model.config, codec={"name": "pixels", "scale": 1.0, "image_size": 16}, class_names=(), objective=objective
    )
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "config": config, "step": 1}, path)
    return path


def sample(mode: str, checkpoint: Path, folder: Path, *extra: str) -> np.ndarray:
    sample_ddp.main(
        [mode, "--ckpt", str(checkpoint), "--sample-dir", str(folder), "--num-fid-samples", "5", "--num-sampling-steps", "6",
         "--per-proc-batch-size", "3", *extra]
    )  # fmt: skip
    return np.load(folder / "samples_5x16x16x3.npz")["arr_0"]
