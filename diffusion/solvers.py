"""Fixed-step solvers of dx/dt = drift(x, t) on a grid of times.

Heun is the improved Euler method: two drift evaluations a step. Adams-Bashforth of order k (Hairer, Norsett & Wanner,
"Solving ordinary differential equations I", sec. III.1) extrapolates the last k drifts: one evaluation a step, once it has k of
them. Its first k - 1 steps are Runge-Kutta steps whose error does not lower the order: Heun for k = 2 and 3, Kutta's
third-order method (three evaluations) for k = 4.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Drift = Callable[[Tensor, Tensor], Tensor]  # (x, t): t a scalar tensor of the grid


class Step(NamedTuple):
    """x: the state after a step. slope: the drift at the step's start."""

    x: Tensor
    slope: Tensor


@dataclass(frozen=True)
class Method:
    """adams: weights of the last drifts, newest first. start: the step taken where there are too few drifts, or no weights."""

    adams: tuple[float, ...] = ()
    start: Callable[[Drift, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


def _heun(drift: Drift, x: Tensor, t: Tensor, t_next: Tensor, slope: Tensor) -> Tensor:
    h = (t_next - t).item()
    return x + h / 2 * (slope + drift(x + h * slope, t_next))


def _kutta3(drift: Drift, x: Tensor, t: Tensor, t_next: Tensor, slope: Tensor) -> Tensor:
    h = (t_next - t).item()
    middle = drift(x + h / 2 * slope, (t + t_next) / 2)
    return x + h / 6 * (slope + 4 * middle + drift(x + h * (2 * middle - slope), t_next))


METHODS = {
    "euler": Method(adams=(1,)),
    "heun2": Method(start=_heun),
    "ab2": Method(adams=(3 / 2, -1 / 2), start=_heun),
    "ab3": Method(adams=(23 / 12, -16 / 12, 5 / 12), start=_heun),
    "ab4": Method(adams=(55 / 24, -59 / 24, 37 / 24, -9 / 24), start=_kutta3),
}
ALIASES = {"heun": "heun2"}


def fixed_steps(drift: Drift, x: Tensor, times: Tensor, method: str) -> Iterator[Step]:
    """Integrate from x at times[0] to times[-1], lazily: nothing is evaluated before the step that needs it is asked for.

    times: (K + 1,) on the CPU in float64, rising or falling; evenly spaced for Adams-Bashforth. method: a key of
    :data:`METHODS` or :data:`ALIASES`, in any case. Raises ValueError at once for any other.
    """
    name = ALIASES.get(method.lower(), method.lower())
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join([*METHODS, *ALIASES])}; got {method!r}")
    widths = times.diff()
    if len(METHODS[name].adams) > 1 and not torch.allclose(widths, widths.mean(), rtol=1e-3):
        raise ValueError(f"{name} extrapolates drifts at evenly spaced times; take heun2 for uneven ones")
    return _steps(drift, x, times, METHODS[name])


def _steps(drift: Drift, x: Tensor, times: Tensor, method: Method) -> Iterator[Step]:
    slopes = deque(maxlen=len(method.adams) or 1)
    for t, t_next in pairwise(times.unbind()):
        slopes.appendleft(drift(x, t))
        if len(slopes) == len(method.adams):
            h = (t_next - t).item()
            x = x + h * sum(weight * slope for weight, slope in zip(method.adams, slopes, strict=True))
        else:
            x = method.start(drift, x, t, t_next, slopes[0])
        yield Step(x, slopes[0])
