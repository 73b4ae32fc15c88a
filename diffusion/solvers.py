"""Fixed-step solvers of dx/dt = drift(x, t) on a grid of times.

Heun is the improved Euler method: two drift evaluations a step. Adams-Bashforth of order k (Hairer, Norsett & Wanner,
"Solving ordinary differential equations I", sec. III.1) extrapolates the last k drifts: one evaluation a step. It starts with a
step of Heun and goes on with the order that the drifts at hand allow. That keeps the order for k = 2 and 3. For k = 4 the three
first steps leave an error of third order, small beside the method's own until steps are many: a start of fourth order costs
three to six evaluations more, which are better spent on smaller steps.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Drift = Callable[[Tensor, Tensor], Tensor]  # (x, t): t a scalar tensor of the grid


class Step(NamedTuple):
    """x: the state after a step. slope: the drift at the step's start."""

    x: Tensor
    slope: Tensor


ADAMS = {  # weights of the last drifts, newest first
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
METHODS = {"euler": 1, "heun2": None, "ab2": 2, "ab3": 3, "ab4": 4}  # the order of Adams-Bashforth; None: all steps are Heun's
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
    if (METHODS[name] or 1) > 1 and not torch.allclose(widths, widths.mean(), rtol=1e-3):
        raise ValueError(f"{name} extrapolates drifts at evenly spaced times; take heun2 for uneven ones")
    return _steps(drift, x, times, METHODS[name])


def num_evaluations(method: str, num_steps: int) -> int:
    """Drift evaluations of so many steps by a key of :data:`METHODS`."""
    order = METHODS[method]
    return 2 * num_steps if order is None else num_steps + (order > 1)


def _steps(drift: Drift, x: Tensor, times: Tensor, order: int | None) -> Iterator[Step]:
    slopes = deque(maxlen=order or 1)
    for t, t_next in pairwise(times.unbind()):
        slopes.appendleft(drift(x, t))
        h = (t_next - t).item()
        if order == 1 or len(slopes) > 1:
            x = x + h * sum(weight * slope for weight, slope in zip(ADAMS[len(slopes)], slopes, strict=True))
        else:
            x = x + h / 2 * (slopes[0] + drift(x + h * slopes[0], t_next))
        yield Step(x, slopes[0])
