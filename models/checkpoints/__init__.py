"""Checkpoint files -> weights and the network that fits them. Nothing but tensors and plain values is ever unpickled."""

from models.checkpoints.build import build_model, check_name, differences, load_weights, summary, warm_start
from models.checkpoints.files import read_file, weights_file
from models.checkpoints.read import Checkpoint, describe, load_checkpoint, read_checkpoint

__all__ = [
    "Checkpoint",
    "build_model",
    "check_name",
    "describe",
    "differences",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
    "read_file",
    "summary",
    "warm_start",
    "weights_file",
]
