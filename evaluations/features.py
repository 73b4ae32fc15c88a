"""Feature extractors, by the name ``--features`` gives them.

An extractor turns a batch of uint8 images (B, H, W, 3) into :class:`Features`; a new one is a row in ``EXTRACTORS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

PIXELS_SIDE = 32  # a covariance of 32 * 32 * 3 pixels has 75 MB; of 256 * 256 * 3 it would have 309 GB


@dataclass(frozen=True)
class Features:
    """What an extractor knows of a batch of images, each float32 or None where it has no such layer."""

    pool: np.ndarray  # (B, D): FID, precision and recall
    spatial: np.ndarray | None = None  # (B, D_s): sFID
    probs: np.ndarray | None = None  # (B, classes), rows sum to 1: inception score


Extractor = Callable[[np.ndarray], Features]


def pixels(images: np.ndarray) -> Features:
    """The pixels themselves, scaled to [0, 1]; images larger than 32 x 32 are averaged down to it.

    Needs no weights and no network: for small images and for checking a pipeline, not for comparing with published numbers.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    side = (min(x.shape[2], PIXELS_SIDE), min(x.shape[3], PIXELS_SIDE))
    return Features(pool=F.adaptive_avg_pool2d(x, side).flatten(1).numpy())


EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "pixels": lambda: pixels,
}


def create_features(name: str) -> Extractor:
    """The extractor called ``name``. Raises ValueError for an unknown name, with those that exist."""
    if name not in EXTRACTORS:
        raise ValueError(f"--features {name!r} is unknown; there are: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]()
