"""The networks, and nothing else: they know nothing of losses or command lines."""

from models.checkpoints import load_checkpoint
from models.registry import create_model, model_names

__all__ = ["create_model", "load_checkpoint", "model_names"]
