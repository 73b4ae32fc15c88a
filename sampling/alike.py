"""What checkpoints that work together must share."""

from collections.abc import Callable

from data.store import PUBLISHED_SCALE
from models.checkpoints import Checkpoint

# Trained for the same thing on the same latents; by name.
COMMON: dict[str, Callable[[Checkpoint], object]] = {
    "objective": lambda checkpoint: checkpoint.objective["name"],
    "path_type": lambda checkpoint: checkpoint.objective.get("path_type", "Linear"),
    "prediction": lambda checkpoint: checkpoint.objective.get("prediction", "velocity"),
    "codec scale": lambda checkpoint: checkpoint.codec.get("scale", PUBLISHED_SCALE),
    "input_size": lambda checkpoint: checkpoint.config.input_size,
    "in_channels": lambda checkpoint: checkpoint.config.in_channels,
    "num_classes": lambda checkpoint: checkpoint.config.num_classes,
}


def require_common(first: Checkpoint, other: Checkpoint, who: str, properties: dict = COMMON) -> None:
    """Raises ValueError with the first property in which they differ. who: must share it, for the message."""
    for what, of in properties.items():
        a, b = of(first), of(other)
        if a != b:
            raise ValueError(f"{other.path} has {what} {b}, {first.path} has {a}: {who} must share it")
