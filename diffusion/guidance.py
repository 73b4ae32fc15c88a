"""Guidance as a wrapper: a guided network is called as an unguided one, with B samples and B labels."""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 1e-6  # of a noise level at an end of the interval


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """Raises ValueError unless 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the guidance interval must be LOW,HIGH with 0 <= LOW < HIGH <= 1, got {low:g},{high:g}")
    return low, high


class ClassifierFreeGuidance:
    """Doubles the batch, asks ``model.forward_with_cfg`` and returns the guided half.

    scale 1 calls the plain network: the guided result is then the conditional one. channels: how many of the first channels are
    guided; 3 is the published protocol, None guides all. interval: guide only at noise levels from low to high, both included
    (Kynkaanniemi et al. 2024, "Applying guidance in a limited interval"), where 1 is pure noise and 0 data: t/1000 of Gaussian
    diffusion, 1 - t of a transport. Raises ValueError for a negative scale or NaN, and an interval that is none.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        scale: float,
        null_label: int,
        channels: int | None = 3,
        interval: tuple[float, float] | None = None,
    ):
        if not scale >= 0:
            raise ValueError(f"the guidance scale must not be negative, got {scale}")
        self.model, self.scale, self.null_label, self.channels = model, scale, null_label, channels
        self.interval = None if interval is None else check_interval(interval)
        # A scale that depends on time, as MDTv2's, may be 1 at some times.
        self._scale_at = getattr(model, "guidance_scale", lambda scale, t: scale)
        self._scale_varies = isinstance(self._scale_at(scale, torch.zeros(1)), Tensor)

    @property
    def varies(self) -> bool:
        """Whether :meth:`at` depends on the time."""
        return self.scale != 1 and (self.interval is not None or self._scale_varies)

    def at(self, t: float, level: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What to call at the network's time t, of that noise level: where nothing is guided the network itself, for half the
        work. Both are numbers and not tensors, so that nothing waits for the device."""
        return self._guided if self._guides(t, level) else self.model

    def _guides(self, t: float, level: float) -> bool:
        if self.scale == 1:
            return False
        if self.interval is not None:
            level = min(max(level, 0), 1)  # adaptive solvers look beyond the end
            if not self.interval[0] - ROUNDING <= level <= self.interval[1] + ROUNDING:
                return False
        return not self._scale_varies or self._scale_at(self.scale, torch.tensor([t])).item() != 1

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Raises ValueError for guidance in an interval, which must be asked through :meth:`at`."""
        if self.scale == 1:
            return self.model(x, t, y)
        if self.interval is not None:
            raise ValueError("guidance in an interval depends on the noise level: call at(t, level), as the sampling loops do")
        return self._guided(x, t, y)

    def _guided(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.null_label)])
        return self.model.forward_with_cfg(*doubled, self.scale, self.channels).chunk(2)[0]


def varies(model: Callable[..., Tensor]) -> bool:
    """Whether a loop must ask ``model.at`` what to call at each time."""
    return isinstance(model, ClassifierFreeGuidance) and model.varies
