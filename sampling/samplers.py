"""Ways from noise to latents, each around one of the mathematics of :mod:`diffusion`, all called alike."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.few_steps import SCHEMES, FewSteps, create_few_steps
from diffusion.solvers import ALIASES, METHODS
from diffusion.transport import ODE, SDE
from diffusion.transport.likelihood import log_likelihood
from diffusion.transport.ode import ADAPTIVE_METHODS, GRID_METHODS
from diffusion.transport.sde import SDE_METHODS
from models.stepwise import StepwiseNetwork

StepNoise = Callable[[int], Tensor]
GAUSSIAN_SOLVERS = ("ancestral", "ddim", *SCHEMES)
OFFERED = {name: alias for alias, name in ALIASES.items()}  # torchdiffeq's name, and the one that is shown
WATCHABLE_SOLVERS = tuple(OFFERED.get(name, name) for name in METHODS)  # of an ODE, step by step
ODE_SOLVERS = (*WATCHABLE_SOLVERS, *ADAPTIVE_METHODS, *GRID_METHODS)
SDE_SOLVERS = tuple(name.lower() for name in SDE_METHODS)


def transport_settings(objective: dict) -> dict:
    """What :func:`diffusion.transport.create_transport` takes, of a checkpoint's objective."""
    return {key: value for key, value in objective.items() if key != "name"}


class Sampler(Protocol):
    """Turns noise into latents with a network.

    Yields after every step a dict: sample, the state; pred_xstart, the step's prediction of the finished latents; the last one
    may hold more about each sample. step_noise(k) is the noise of step k = 1, 2, ...
    """

    @property
    def num_steps(self) -> int:
        """How many dicts it yields."""

    @property
    def num_solver_steps(self) -> int:
        """The same without an SDE's separate last step."""

    @property
    def num_evaluations(self) -> int | None:
        """Network calls that a sample makes, of a network without guidance; None: it depends on the sample."""

    @property
    def may_be_filled(self) -> bool:
        """Whether a batch filled up with copies gives the same samples, and spares a compiled network a second shape."""

    @property
    def settings(self) -> dict:
        """What its samples depend on, as plain values."""

    def __call__(
        self, model: Callable[..., Tensor], noise: Tensor, y: Tensor, step_noise: StepNoise
    ) -> Iterator[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class GaussianSampler:
    """Ancestral sampling, or DDIM with ``eta``."""

    diffusion: GaussianDiffusion
    ddim: bool = False
    eta: float = 0.0
    may_be_filled: ClassVar[bool] = True

    @property
    def num_steps(self) -> int:
        return self.diffusion.num_timesteps

    @property
    def num_solver_steps(self) -> int:
        return self.num_steps

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    @property
    def settings(self) -> dict:
        solver = "ddim" if self.ddim else "ancestral"
        return {"sampler": "Gaussian", "solver": solver, "num_sampling_steps": self.num_steps, "eta": self.eta}

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        kwargs = {"model_kwargs": {"y": y}, "step_noise": step_noise}
        if self.ddim:
            return self.diffusion.ddim_sample_loop_progressive(model, noise, **kwargs, eta=self.eta)
        return self.diffusion.p_sample_loop_progressive(model, noise, **kwargs)


@dataclass(frozen=True)
class FewStepsSampler:
    """Gaussian diffusion by one of the solvers of :mod:`diffusion.few_steps`."""

    process: FewSteps
    may_be_filled: ClassVar[bool] = True

    @property
    def num_steps(self) -> int:
        return self.process.num_steps

    @property
    def num_solver_steps(self) -> int:
        return self.num_steps

    @property
    def num_evaluations(self) -> int:
        return len(self.process.calls)

    @property
    def settings(self) -> dict:
        return {"sampler": "Gaussian", "solver": self.process.solver, "num_sampling_steps": self.num_steps}

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        return self.process.steps(model, noise, model_kwargs={"y": y}, step_noise=step_noise)


def gaussian_sampler(solver: str, num_steps: int) -> GaussianSampler | FewStepsSampler:
    """solver: one of GAUSSIAN_SOLVERS. Raises ValueError for another one, and for a number of steps that it cannot take."""
    if solver in SCHEMES:
        return FewStepsSampler(create_few_steps(solver, num_steps))
    if solver not in GAUSSIAN_SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(GAUSSIAN_SOLVERS)}; got {solver!r}")
    return GaussianSampler(create_diffusion(str(num_steps)), ddim=solver == "ddim")


@dataclass(frozen=True)
class TransportSampler:
    """A transport's SDE, or its ODE.

    likelihood: of an ODE; the last dict also holds log_likelihood (B,), in nats, of the finished latents, which takes network
    calls of its own.
    """

    process: SDE | ODE
    likelihood: bool = False

    @property
    def num_steps(self) -> int:
        return self.process.num_yields

    @property
    def num_solver_steps(self) -> int:
        return self.process.num_steps - 1 if isinstance(self.process, SDE) else self.process.num_yields

    @property
    def num_evaluations(self) -> int | None:
        """Of the sample alone, without those of its likelihood."""
        return self.process.num_evaluations

    @property
    def may_be_filled(self) -> bool:
        """Not where samples share their steps, nor where each is solved by itself."""
        return not (isinstance(self.process, ODE) and (self.process.coupled or self.process.per_sample))

    @property
    def settings(self) -> dict:
        options = {entry.name: getattr(self.process, entry.name) for entry in dataclasses.fields(self.process) if entry.init}
        transport, method = options.pop("transport"), options.pop("sampling_method").lower()
        named = {"sampler": type(self.process).__name__, "solver": OFFERED.get(method, method)}
        return {**named, **transport.describe(), **options, "likelihood": self.likelihood}

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        draws = {"step_noise": step_noise} if isinstance(self.process, SDE) else {}
        steps = self.process.steps(model, noise, model_kwargs={"y": y}, **draws)
        for k, out in enumerate(steps, start=1):
            if self.likelihood and k == self.num_steps:
                probe = step_noise(1).sign()  # Rademacher: the ODE itself draws no noise
                ode = dataclasses.replace(self.process, reverse=True)
                out["log_likelihood"], _ = log_likelihood(ode, model, out["sample"], probe, {"y": y})
            yield out


@dataclass(frozen=True)
class SwitchingSampler:
    """``inner`` with a network that changes with the state: each sample goes on to the next model as its policy says.

    The last dict holds switch_steps (B, stages - 1) and evaluations (B, stages) as well: see
    :class:`models.stepwise.StepwiseNetwork`. network: the one that the callable handed over asks, perhaps through guidance.
    """

    inner: Sampler
    network: StepwiseNetwork

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    @property
    def num_solver_steps(self) -> int:
        return self.inner.num_solver_steps

    @property
    def num_evaluations(self) -> int | None:
        return self.inner.num_evaluations

    may_be_filled: ClassVar[bool] = False  # its networks meet parts of the batch, of any size

    @property
    def settings(self) -> dict:
        return {**self.inner.settings, **dataclasses.asdict(self.network.tracker.policy)}

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        self.network.begin(len(noise))
        for k, out in enumerate(self.inner(model, noise, y, step_noise), start=1):
            if k <= self.num_solver_steps:
                self.network.observe(out["sample"])
            yield {**out, "switch_steps": self.network.switch_steps, "evaluations": self.network.evaluations}
