"""The reverse SDE dx = (velocity + w score) dt + sqrt(2 w) dW from noise to data (SiT eq. 6), with w(t) of choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.transport.options import choose, require_num_steps, require_number
from diffusion.transport.paths import DIFFUSION_FORMS, PUBLISHED_SPELLINGS
from diffusion.transport.transport import Model, Prediction, Transport, scale

SDE_METHODS = ("Euler", "Heun")
LAST_STEPS = (None, "Mean", "Euler", "Tweedie")
SAFE_EPS = 1e-3  # where an SBDM SDE starts when sample_eps is 0
SINGULAR = 1e9  # a drift coefficient above this is a pole that rounding hides

StepNoise = Callable[[int], Tensor]  # k = 1, 2, ...: standard normal noise of solver step k, of the sample's shape


@dataclass(frozen=True)
class SDE:
    """A sampler's options, checked when they are given (ValueError).

    sampling_method: Euler (one network call a step) or Heun (two). diffusion_form, diffusion_norm: w(t), see
    :data:`diffusion.transport.paths.DIFFUSION_FORMS`. num_steps: points of the even time grid, so num_steps - 1 solver steps.
    last_step: from the end of the grid to t = 1, last_step_size further, without noise: Mean goes along the SDE's drift, Euler
    along the velocity, Tweedie to the prediction of x_data; None (or "none") lets the grid end at t = 1 (less sample_eps).

    SBDM on Linear and GVP is infinite at t = 0: there its grid starts at sample_eps, or at 1e-3 where that is 0.
    """

    transport: Transport
    sampling_method: str = "Euler"
    diffusion_form: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04
    num_steps: int = 250
    times: Tensor = field(init=False, repr=False, compare=False)  # (num_steps,), float64 on the CPU

    def __post_init__(self):
        form = PUBLISHED_SPELLINGS.get(self.diffusion_form, self.diffusion_form)
        checked = {
            "sampling_method": choose("sampling_method", self.sampling_method, SDE_METHODS),
            "diffusion_form": choose("diffusion_form", form, DIFFUSION_FORMS),
            "diffusion_norm": require_number("diffusion_norm", self.diffusion_norm, 0),
            "last_step": choose("last_step", self.last_step, LAST_STEPS),
            "num_steps": require_num_steps(self.num_steps),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.last_step is None:
            object.__setattr__(self, "last_step_size", 0.0)
        elif not require_number("last_step_size", self.last_step_size, 0, 0.5) > 0:
            raise ValueError(
                f"last_step_size must be above 0 for last_step {self.last_step}; last_step None takes no last step"
            )
        object.__setattr__(self, "times", torch.linspace(*self._interval(), self.num_steps, dtype=torch.float64))
        self._require_finite_drift()

    def _interval(self) -> tuple[float, float]:
        transport = self.transport
        t0, t1 = transport.check_interval(
            transport.train_eps,
            transport.sample_eps,
            diffusion_form=self.diffusion_form,
            sde=True,
            eval=True,
            last_step_size=self.last_step_size,
        )
        if self.diffusion_form == "SBDM" and transport.path.starts_at_noise:
            t0 = t0 or SAFE_EPS
        return t0, t1

    def _require_finite_drift(self) -> None:
        """The published code returns NaN where a network call meets a pole of the score or of the velocity."""
        ends_at_last = self.sampling_method == "Heun" or self.last_step is not None
        t = self.times if ends_at_last else self.times[:-1]
        w = self.diffusion(t)
        w = w.where(w != 0, 1)  # zero times a pole is no number either
        size = sum(c.abs() for c in self.transport.coefficients("velocity", t))
        size = size + sum((w * c).abs() for c in self.transport.coefficients("score", t))
        poles = t[~(size < SINGULAR)]
        if len(poles):
            transport = self.transport
            raise ValueError(
                f"the SDE's drift is infinite at t = {poles[0].item():g} for path_type {transport.path_type}, "
                f"prediction {transport.prediction}, sampling_method {self.sampling_method}, diffusion_form "
                f"{self.diffusion_form}, last_step {self.last_step}, "
                f"sample_eps {transport.sample_eps:g}: give a last_step (Mean), or sample_eps 1e-3"
            )

    @property
    def num_yields(self) -> int:
        """How many dicts :meth:`steps` yields: one a solver step, and one for the last step."""
        return self.num_steps - 1 + (self.last_step is not None)

    @property
    def num_evaluations(self) -> int:
        """Network calls of a sample."""
        return (2 if self.sampling_method == "Heun" else 1) * (self.num_steps - 1) + (self.last_step is not None)

    def diffusion(self, t: Tensor) -> Tensor:
        """w(t), like t."""
        return DIFFUSION_FORMS[self.diffusion_form](self.transport.path, t, self.diffusion_norm)

    def drift(self, p: Prediction) -> Tensor:
        """velocity + w score, from one network call."""
        return p.velocity + scale(self.diffusion(p.t), p.score)

    def steps(
        self, model: Model, noise: Tensor, *, step_noise: StepNoise | None = None, model_kwargs: dict | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the sample after every step and the prediction of x_data that the step started from (pred_xstart).

        noise: x at t0, (B, C, ...). step_noise(k): the noise of solver step k = 1, 2, ..., so that a caller can make it a
        function of each sample; None draws from torch's global generator.
        """
        x, kwargs = noise, model_kwargs or {}
        for k, (t, t_next) in enumerate(pairwise(self.times.unbind()), start=1):
            dt = (t_next - t).item()
            added = scale((2 * self.diffusion(t) * dt).sqrt(), _draw(step_noise, k, x))
            if self.sampling_method == "Euler":
                p = self.transport.predict(x, t, model, **kwargs)
                x = x + dt * self.drift(p) + added
            else:  # SiT's Heun adds the noise first
                x = x + added
                p = self.transport.predict(x, t, model, **kwargs)
                first = self.drift(p)
                second = self.drift(self.transport.predict(x + dt * first, t_next, model, **kwargs))
                x = x + dt / 2 * (first + second)
            yield {"sample": x, "pred_xstart": p.data}
        if self.last_step is not None:
            p = self.transport.predict(x, self.times[-1], model, **kwargs)
            yield {"sample": self._last(p), "pred_xstart": p.data}

    def _last(self, p: Prediction) -> Tensor:
        if self.last_step == "Mean":
            return p.x + self.last_step_size * self.drift(p)
        if self.last_step == "Euler":
            return p.x + self.last_step_size * p.velocity
        return p.data


def _draw(step_noise: StepNoise | None, k: int, x: Tensor) -> Tensor:
    if step_noise is None:
        return torch.randn_like(x)
    noise = step_noise(k)
    if noise.shape != x.shape:
        raise ValueError(f"step_noise({k}) must have the sample's shape {tuple(x.shape)}, got {tuple(noise.shape)}")
    return noise.to(x)
