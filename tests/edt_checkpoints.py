"""Checkpoints of small EDTs with random weights."""

from pathlib import Path

import torch

from models import create_model
from models.checkpoints import describe
from models.edt import EDT
from tests.shared import perturb


def random_edt(seed: int = 0, **settings) -> EDT:
    """An EDT-Ti/2 whose every block contributes."""
    torch.manual_seed(seed)
    return perturb(create_model("EDT-Ti/2", **settings), 0.02)


def random_checkpoint(path: Path, seed: int = 0) -> Path:
    model = random_edt(seed)
    config = describe("EDT-Ti/2", model.config, codec={"name": "pixels", "scale": 1.0, "image_size": 16}, class_names=())
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "config": config, "step": 1}, path)
    return path
