"""Sampling functions and step-by-step iterators of a transport, under the names of the SiT system."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from diffusion.transport.likelihood import Probe, log_likelihood
from diffusion.transport.ode import ODE
from diffusion.transport.sde import SDE, StepNoise
from diffusion.transport.transport import Model, Transport

Keep = Iterable[int] | str | None


class Sampler:
    """Samplers of a transport. ``options`` are the fields of :class:`~diffusion.transport.sde.SDE` or
    :class:`~diffusion.transport.ode.ODE`; they are checked when a sampler or an iterator is made (ValueError).

    keep: which states the list that a sampling function returns holds beside the final one, its last entry. None: no other.
    A set of step numbers: the states after these steps (ODE: 0 is the noise itself). "all": as published, each SDE step, or
    each point of the ODE's grid.
    """

    def __init__(self, transport: Transport):
        self.transport = transport

    def sde(self, **options) -> SDE:
        return SDE(self.transport, **options)

    def ode(self, **options) -> ODE:
        return ODE(self.transport, **options)

    def sample_sde(self, *, step_noise: StepNoise | None = None, keep: Keep = None, **options) -> Callable[..., list[Tensor]]:
        """sample(z, model, **model_kwargs) -> states, with options of SDE; step_noise: see :meth:`SDE.steps`."""
        sde = self.sde(**options)
        kept = _kept(keep, 1, sde.num_yields)

        def sample(z: Tensor, model: Model, **model_kwargs) -> list[Tensor]:
            steps = sde.steps(model, z, step_noise=step_noise, model_kwargs=model_kwargs)
            return [out["sample"] for k, out in enumerate(steps, start=1) if k in kept]

        return sample

    def sample_ode(self, *, keep: Keep = None, **options) -> Callable[..., list[Tensor]]:
        """sample(z, model, **model_kwargs) -> states, with options of ODE. z is noise, or with ``reverse`` data."""
        ode = self.ode(**options)
        kept = _kept(keep, 0, ode.num_steps - 1)

        def sample(z: Tensor, model: Model, **model_kwargs) -> list[Tensor]:
            return ode.integrate(ode.drift_of(model, z, model_kwargs), z, kept)

        return sample

    def sample_ode_likelihood(self, *, probe: Probe | None = None, **options) -> Callable[..., tuple[Tensor, Tensor]]:
        """likelihood(x, model, **model_kwargs) -> (log p(x) in nats, (B,); the noise of x), with options of ODE but reverse.

        probe: see :func:`~diffusion.transport.likelihood.log_likelihood`.
        """
        ode = self.ode(reverse=True, **options)
        return lambda x, model, **model_kwargs: log_likelihood(ode, model, x, probe, model_kwargs)

    def sde_steps(
        self, model: Model, noise: Tensor, *, step_noise: StepNoise | None = None, model_kwargs: dict | None = None, **options
    ) -> Iterator[dict[str, Tensor]]:
        """Yield sample and pred_xstart after every step, ``sde(**options).num_yields`` times, each computed when it is asked
        for: what the model does may be changed between two steps."""
        return self.sde(**options).steps(model, noise, step_noise=step_noise, model_kwargs=model_kwargs)

    def ode_steps(
        self, model: Model, noise: Tensor, *, model_kwargs: dict | None = None, **options
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`sde_steps`; torchdiffeq's methods yield once, at the end."""
        return self.ode(**options).steps(model, noise, model_kwargs=model_kwargs)


def _kept(keep: Keep, first: int, last: int) -> set[int]:
    if keep is None:
        return {last}
    if keep == "all":
        return set(range(first, last + 1))
    kept = set() if isinstance(keep, str) else set(keep)
    if isinstance(keep, str) or not kept <= set(range(first, last + 1)):
        raise ValueError(f'keep must be None, "all", or step numbers from {first} to {last}; got {keep!r}')
    return kept | {last}
