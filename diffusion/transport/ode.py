"""The probability-flow ODE dx/dt = velocity, with our fixed-step solvers or those of torchdiffeq."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
import torchdiffeq
from torch import Tensor

from diffusion import solvers
from diffusion.solvers import Drift, fixed_steps
from diffusion.transport.options import choose, require_num_steps, require_number
from diffusion.transport.transport import Model, Transport

# torchdiffeq's methods; its euler and heun2 are ours as well. The first group chooses its own steps.
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
GRID_METHODS = ("midpoint", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
EVALUATIONS = {"midpoint": 2, "heun3": 3, "rk4": 4}  # of a step, where they do not depend on the sample or the step
COUPLING_METHODS = (*ADAPTIVE_METHODS, "implicit_adams", "fixed_adams")  # the last two iterate until the batch has converged


@dataclass(frozen=True)
class ODE:
    """A sampler's options, checked when they are given (ValueError).

    sampling_method: euler, heun (heun2), ab2, ab3 or ab4 of :mod:`diffusion.solvers`, or a method of torchdiffeq. num_steps:
    points of the even time grid, so num_steps - 1 solver steps, which of abK must be at least K; an adaptive method takes its
    own steps and meets an error of atol + rtol |x|. reverse: from data to noise. per_sample: torchdiffeq's methods solve each
    sample on its own; otherwise the steps of an adaptive or iterating one, and so each sample, depend a little on the batch.
    """

    transport: Transport
    sampling_method: str = "dopri5"
    num_steps: int = 50
    atol: float = 1e-6
    rtol: float = 1e-3
    reverse: bool = False
    per_sample: bool = False
    times: Tensor = field(init=False, repr=False, compare=False)  # (num_steps,), float64 on the CPU

    def __post_init__(self):
        transport = self.transport
        names = (*solvers.METHODS, *solvers.ALIASES, *ADAPTIVE_METHODS, *GRID_METHODS)
        method = choose("sampling_method", self.sampling_method, names)
        object.__setattr__(self, "sampling_method", solvers.ALIASES.get(method, method))
        require_num_steps(self.num_steps)
        order = solvers.METHODS.get(self.sampling_method) or 1
        if self.num_steps <= order:  # no step would be of its order
            raise ValueError(
                f"{method} takes at least {order + 1} points in time, got {self.num_steps}: with so few, take heun"
            )
        for name in ("atol", "rtol"):
            require_number(name, getattr(self, name), 0)
        if not self.atol + self.rtol > 0:
            raise ValueError("atol and rtol must not both be 0: give atol 1e-6")
        interval = transport.check_interval(transport.train_eps, transport.sample_eps, eval=True, reverse=self.reverse)
        object.__setattr__(self, "times", torch.linspace(*interval, self.num_steps, dtype=torch.float64))
        velocity = torch.stack(transport.coefficients("velocity", self.times))
        if not velocity.isfinite().all():
            raise ValueError(
                f"the velocity is infinite at an end of t in {sorted(interval)} for path_type {transport.path_type}, "
                f"prediction {transport.prediction}, sample_eps {transport.sample_eps:g}: give sample_eps 1e-3"
            )

    @property
    def fixed(self) -> bool:
        """Whether the method is one of ours, which can be watched step by step."""
        return self.sampling_method in solvers.METHODS

    @property
    def coupled(self) -> bool:
        """Whether a sample depends, within the tolerances, on which others are in its batch."""
        return self.sampling_method in COUPLING_METHODS and not self.per_sample

    @property
    def num_yields(self) -> int:
        """How many dicts :meth:`steps` yields."""
        return self.num_steps - 1 if self.fixed else 1

    @property
    def num_evaluations(self) -> int | None:
        """Network calls of a sample; None where they depend on it, or torchdiffeq does not say."""
        if self.fixed:
            return solvers.num_evaluations(self.sampling_method, self.num_steps - 1)
        calls = EVALUATIONS.get(self.sampling_method)
        return calls and calls * (self.num_steps - 1)

    def steps(self, model: Model, noise: Tensor, *, model_kwargs: dict | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield the sample after every step and the prediction of x_data that the step started from (pred_xstart).

        noise: x at the first time, (B, C, ...). A method of torchdiffeq yields once, at the end, with pred_xstart = sample.
        """
        drift_of = self.drift_of(model, noise, model_kwargs or {})
        if not self.fixed:
            [sample] = self.integrate(drift_of, noise, {self.num_steps - 1})
            yield {"sample": sample, "pred_xstart": sample}
            return
        x = noise
        steps = fixed_steps(drift_of(slice(None)), noise, self.times, self.sampling_method)
        for (t, _), step in zip(pairwise(self.times.unbind()), steps, strict=True):
            yield {"sample": step.x, "pred_xstart": self.transport.data_from_velocity(x, t, step.slope)}
            x = step.x

    def drift_of(self, model: Model, z: Tensor, model_kwargs: dict) -> Callable[[slice], Drift]:
        """The drift of some samples of the batch z."""

        def of(rows: slice) -> Drift:
            kwargs = rows_of(model_kwargs, rows, len(z))
            return lambda x, t: self.transport.predict(x, t, model, **kwargs).velocity

        return of

    def integrate(self, drift_of: Callable[[slice], Drift], z: Tensor, kept: set[int]) -> list[Tensor]:
        """The states at the points ``kept`` of the grid (0: z itself), in order. drift_of(rows): the drift of these samples."""
        if self.fixed:
            steps = fixed_steps(drift_of(slice(None)), z, self.times, self.sampling_method)
            return [x for k, x in enumerate(chain([z], (step.x for step in steps))) if k in kept]
        if not self.per_sample:
            return self._odeint(drift_of(slice(None)), z, kept)
        each = [self._odeint(drift_of(slice(i, i + 1)), z[i : i + 1], kept) for i in range(len(z))]
        return [torch.cat(states) for states in zip(*each, strict=True)]

    def _odeint(self, drift: Drift, z: Tensor, kept: set[int]) -> list[Tensor]:
        grid = self.times.to(z)
        points = sorted(kept | {0, self.num_steps - 1})
        try:
            states = torchdiffeq.odeint(
                lambda t, x: drift(x, t), z, grid[points], method=self.sampling_method, **self._torchdiffeq_options(grid)
            )
        except AssertionError as error:  # torchdiffeq's word for a step that has shrunk to nothing, or to NaN
            raise ValueError(
                f"sampling_method {self.sampling_method} found no step that meets atol {self.atol:g} and rtol {self.rtol:g} "
                f"({error}): take a fixed-step method such as heun, or larger tolerances"
            ) from error
        return [state for point, state in zip(points, states, strict=True) if point in kept]

    def _torchdiffeq_options(self, grid: Tensor) -> dict:
        if self.sampling_method == "scipy_solver":
            return {"atol": self.atol, "rtol": self.rtol}
        options = {}
        if self.sampling_method in GRID_METHODS:  # steps on the whole grid, though not all of it is stored
            options["grid_constructor"] = lambda func, y0, t: grid
        else:
            if (self.transport.path_type, self.transport.prediction) == ("VP", "noise"):
                options["step_t"] = grid[-1:]  # the last step would reach beyond t = 1, where sigma is no number
            if grid.device.type == "mps":
                options["dtype"] = grid.dtype  # instead of float64, which MPS lacks
        # Lists, as published: torchdiffeq then compares the error with them in float64.
        return {"atol": [self.atol], "rtol": [self.rtol], "options": options}


def rows_of(model_kwargs: dict, rows: slice, batch_size: int) -> dict:
    """model_kwargs of some samples of a batch: tensors whose first dimension is the batch's are cut."""

    def cut(value):
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch_size else value

    return {name: cut(value) for name, value in model_kwargs.items()}
