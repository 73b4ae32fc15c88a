"""Fixed-step solvers: orders of convergence, torchdiffeq as an independent reference, and what a step costs."""

import math

import numpy as np
import pytest
import torch
import torchdiffeq
from torch.testing import assert_close

from diffusion.solvers import ALIASES, METHODS, fixed_steps, num_evaluations

ORDERS = {"euler": 1, "heun": 2, "ab2": 2, "ab3": 3, "ab4": 3}  # of ab4 its start's: its own is below
# Drift evaluations of each step.
EVALUATIONS = {"euler": [1] * 6, "heun": [2] * 6} | {name: [2, 1, 1, 1, 1, 1] for name in ("ab2", "ab3", "ab4")}


def grid(start, end, num_steps):
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64)


def last(*args):
    return list(fixed_steps(*args))[-1].x


def drift(x, t):
    """Through x(t) = 1 / (2 - sin t)."""
    return t.cos() * x**2


@pytest.mark.parametrize("method, order", ORDERS.items())
@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)], ids=["forward", "backward"])
def test_order_of_convergence(method, order, ends):
    start, end = ends
    x = torch.tensor([1 / (2 - math.sin(start))], dtype=torch.float64)
    errors = [(last(drift, x, grid(start, end, n), method) - 1 / (2 - math.sin(end))).abs().item() for n in (400, 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["euler", "heun2"])
def test_torchdiffeq_agrees(method):
    x, times = torch.tensor([1.0, 0.5, -0.2], dtype=torch.float64), grid(0, 1, 7)
    expected = torchdiffeq.odeint(lambda t, x: drift(x, t), x, times, method=method)[1:]
    assert_close(torch.stack([step.x for step in fixed_steps(drift, x, times, method)]), expected, rtol=1e-12, atol=0)


def test_the_fourth_order_of_ab4():
    """From exact starting values: the error of a step, over that of a step half as wide, is 2^5."""
    errors = []
    for n in (50, 100):
        times = grid(0, 1, n)[:5]
        exact = 1 / (2 - times.sin())
        states = [step.x for step in fixed_steps(lambda x, t: t.cos() / (2 - t.sin()) ** 2, exact[0], times, "ab4")]
        errors.append((states[3] - states[2] - (exact[4] - exact[3])).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_exactly(order):
    """Of order k: a drift t^(k-1), from the first step that is not a start-up step on."""
    times = grid(0, 1, 8)
    steps = fixed_steps(
        lambda x, t: t ** (order - 1), torch.zeros((), dtype=torch.float64), times, ["euler", "ab2", "ab3", "ab4"][order - 1]
    )
    states = torch.stack([step.x for step in steps])
    assert_close(states.diff()[order - 1 :], (times**order / order).diff()[order:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ORDERS)
def test_number_of_evaluations(method):
    seen, counts = [], []
    for _ in fixed_steps(lambda x, t: seen.append(t) or x, torch.ones(1), grid(0, 1, 6), method):
        counts.append(len(seen))
        seen.clear()
    assert counts == EVALUATIONS[method]
    name = ALIASES.get(method, method)
    assert [num_evaluations(name, n) for n in range(1, 7)] == np.cumsum(counts).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_lazy_and_report_their_slope(method):
    """Nothing is evaluated ahead, so a drift changed between two steps takes effect in the next."""
    calls, factor = [], 1.0
    times = grid(0, 1, 4)
    steps = fixed_steps(lambda x, t: calls.append(t.item()) or factor * torch.ones(1), torch.zeros(1), times, method)
    assert calls == []
    assert next(steps).slope == 1
    assert calls[0] == 0 and max(calls) <= 0.25
    calls.clear()
    factor = 3.0
    assert next(steps).slope == 3
    assert calls[0] == 0.25 and max(calls) <= 0.5


@pytest.mark.parametrize("method", ["Euler", "HEUN", "Heun2", "AB4"])
def test_names_in_any_case(method):
    times = grid(0, 1, 5)
    assert torch.equal(last(drift, torch.ones(1), times, method), last(drift, torch.ones(1), times, method.lower()))


def test_unknown_methods_fail_at_once():
    with pytest.raises(ValueError, match="method must be one of euler, heun2, ab2, ab3, ab4, heun; got 'rk4'"):
        fixed_steps(drift, torch.ones(1), grid(0, 1, 5), "rk4")


def test_adams_bashforth_on_an_uneven_grid_fails_at_once():
    times = torch.tensor([0, 0.1, 0.5, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="evenly spaced"):
        fixed_steps(drift, torch.ones(1), times, "ab2")
    assert last(drift, torch.ones(1), times, "heun").isfinite()
