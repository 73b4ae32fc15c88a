"""Guidance as a wrapper: a guided network is called as an unguided one, with B samples and B labels.

What the network predicts is pushed away from a weaker prediction, ``weak + scale * (strong - weak)``: its own without the label
(:class:`ClassifierFreeGuidance`), or a weaker network's with it (:class:`Autoguidance`). How strongly follows from the noise
level alone. It is decided by numbers and not by tensors, so that nothing waits for the device.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, y): B of each

ROUNDING = 1e-6  # of a noise level at an end of the interval
UNSEEN = 2.0**-24  # how near 1 a scale is 1 in float32


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """Raises ValueError unless 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"the guidance interval must be LOW,HIGH with 0 <= LOW < HIGH <= 1, got {low:g},{high:g}")
    return low, high


def power_cosine(scale: float, level: float, power: float) -> float:
    """1 + (scale - 1) (1 - cos(pi (1 - level)^power)) / 2: from 1 at pure noise to all of the scale at data, the later the
    higher the power (MDTv2's schedule, where level = t/1000). power 0: the scale at all levels."""
    if not power:
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - level) ** power)) / 2


class Guided:
    """What both kinds of guidance share.

    model: what is guided. scale: 1 calls the plain network. channels: how many of the first channels are guided; 3 is the
    published protocol, None guides all. The variance never is. interval: guide only at noise levels from low to high, both
    included (Kynkaanniemi et al. 2024, "Applying guidance in a limited interval"). power: of :func:`power_cosine`. Noise levels
    are 1 for pure noise and 0 for data: t/1000 of Gaussian diffusion, 1 - t of a transport. Raises ValueError for a negative
    scale or power, NaN, and an interval that is none.
    """

    def __init__(self, model: Network, scale: float, channels: int | None, interval: tuple[float, float] | None, power: float):
        if not scale >= 0:
            raise ValueError(f"the guidance scale must not be negative, got {scale}")
        if not 0 <= power < math.inf:
            raise ValueError(f"the power of guidance must be at least 0 and finite, got {power}")
        self.model, self.scale, self.channels, self.power = model, scale, channels, power
        self.interval = None if interval is None else check_interval(interval)

    @property
    def varies(self) -> bool:
        """Whether :meth:`at` depends on the time."""
        return self.scale != 1 and (self.interval is not None or self.power > 0)

    def scale_at(self, level: float) -> float:
        """The scale at a noise level; 1 where nothing is guided."""
        level = min(max(level, 0.0), 1.0)  # adaptive solvers look beyond the ends
        if self.interval is not None and not self.interval[0] - ROUNDING <= level <= self.interval[1] + ROUNDING:
            return 1.0
        scale = power_cosine(self.scale, level, self.power)
        return 1.0 if abs(scale - 1) <= UNSEEN else scale

    def at(self, t: float, level: float) -> Network:
        """What to call at the network's time t, of that noise level: where nothing is guided the network itself, which spares
        the weaker prediction."""
        scale = self.scale_at(level)
        return self.model if scale == 1 else partial(self._guided, scale)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Raises ValueError for guidance that varies, which must be asked through :meth:`at`."""
        if self.varies:
            raise ValueError("this guidance depends on the noise level: call at(t, level), as the sampling loops do")
        return self.model(x, t, y) if self.scale == 1 else self._guided(self.scale, x, t, y)

    def _guided(self, scale: float, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        strong, weak = (_wide(out) for out in self._predictions(x, t, y))
        channels = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
        above, below = strong[:, :channels], weak[:, :channels]
        return torch.cat([below + scale * (above - below), strong[:, channels:]], dim=1)

    def _predictions(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(strong, weak), each (B, C_out, S, S); of the weak one only the first C channels are used."""
        raise NotImplementedError


class ClassifierFreeGuidance(Guided):
    """Away from the network's own prediction without the label (Ho & Salimans 2022): one call with the batch twice.

    power None: the model's ``cfg_power``, with which it was published, 0 where it has none. Else as :class:`Guided`.
    """

    def __init__(
        self,
        model: Network,
        scale: float,
        null_label: int,
        channels: int | None = 3,
        interval: tuple[float, float] | None = None,
        power: float | None = None,
    ):
        super().__init__(model, scale, channels, interval, getattr(model, "cfg_power", 0.0) if power is None else power)
        self.null_label = null_label

    def _predictions(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        return self.model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)


class Autoguidance(Guided):
    """Away from what a weaker network predicts for the same label (Karras et al. 2024, "Guiding a diffusion model with a bad
    version of itself"): one call of each. guide: smaller, or trained for a shorter time, for the same thing on the same data.
    scale 0 gives the guide. Else as :class:`Guided`."""

    def __init__(
        self,
        model: Network,
        guide: Network,
        scale: float,
        channels: int | None = 3,
        interval: tuple[float, float] | None = None,
        power: float = 0.0,
    ):
        super().__init__(model, scale, channels, interval, power)
        self.guide = guide

    def _predictions(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(x, t, y), self.guide(x, t, y)


def varies(model: Callable[..., Tensor]) -> bool:
    """Whether a loop must ask ``model.at`` what to call at each time."""
    return isinstance(model, Guided) and model.varies


def _wide(out: Tensor) -> Tensor:
    """In float32 at least, whatever precision the network works in."""
    return out.to(torch.promote_types(out.dtype, torch.float32))
