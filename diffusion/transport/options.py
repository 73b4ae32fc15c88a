"""Checks of options that a user gives."""

import math
from collections.abc import Iterable


def choose(argument: str, value: str | None, names: Iterable[str | None]) -> str | None:
    """The member of ``names`` that ``value`` spells, in any case ("none": None, where that is a member), or ValueError."""
    names = list(names)
    for name in names:
        if str(value).lower() == str(name).lower():
            return name
    raise ValueError(f"{argument} must be one of {', '.join(map(str, names))}; got {value!r}")


def require_number(argument: str, value: float, low: float, high: float = math.inf) -> float:
    """A finite number in [low, high)."""
    if not isinstance(value, (int, float)) or not low <= value < high:
        bounds = f"at least {low:g}" + (f" and below {high:g}" if math.isfinite(high) else " and finite")
        raise ValueError(f"{argument} must be a number, {bounds}; got {value!r}")
    return value


def require_num_steps(value: int) -> int:
    if not isinstance(value, int) or value < 2:
        raise ValueError(f"num_steps counts the points of the time grid: a whole number, at least 2; got {value!r}")
    return value
