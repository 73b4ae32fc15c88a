"""Guidance as a wrapper: a guided network is called as an unguided one, with B samples and B labels."""

from collections.abc import Callable

import torch
from torch import Tensor


class ClassifierFreeGuidance:
    """Doubles the batch, asks ``model.forward_with_cfg`` and returns the guided half.

    scale 1 calls the plain network: the guided result is then the conditional one. channels: how many of the first channels are
    guided; 3 is the published protocol, None guides all. Raises ValueError for a negative scale or NaN.
    """

    def __init__(self, model: Callable[..., Tensor], scale: float, null_label: int, channels: int | None = 3):
        if not scale >= 0:
            raise ValueError(f"the guidance scale must not be negative, got {scale}")
        self.model, self.scale, self.null_label, self.channels = model, scale, null_label, channels

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.scale == 1:
            return self.model(x, t, y)
        doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.null_label)])
        return self.model.forward_with_cfg(*doubled, self.scale, self.channels).chunk(2)[0]
