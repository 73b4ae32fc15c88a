"""The log-likelihood of data under the probability-flow ODE (Song et al. 2021, sec. 4.3; Grathwohl et al. 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.solvers import Drift
from diffusion.transport.ode import ODE, rows_of
from diffusion.transport.transport import Model

Probe = Tensor | Callable[[Tensor], Tensor]


def log_likelihood(ode: ODE, model: Model, x: Tensor, probe: Probe | None, model_kwargs: dict) -> tuple[Tensor, Tensor]:
    """(log p(x) in nats, (B,); the noise z that x flows to, like x). ode: reverse.

    log p(x) = log N(z) - integral over t of the velocity's divergence, which is estimated as probe . d(velocity . probe)/dx
    (Hutchinson): without bias if the probe's entries are independent with mean 0 and variance 1. One probe serves the whole
    integration, so that an adaptive solver sees a smooth function. None draws entries of -1 and 1 (Rademacher) from torch's
    global generator; a callable maps x to its probe.
    """
    if probe is None:
        probe = torch.randint_like(x, 2) * 2 - 1
    elif callable(probe):
        probe = probe(x)
    if probe.shape != x.shape:
        raise ValueError(f"probe must have the data's shape {tuple(x.shape)}, got {tuple(probe.shape)}")
    probe = probe.to(x)

    def drift_of(rows: slice) -> Drift:
        return _augmented_drift(ode, model, probe[rows], rows_of(model_kwargs, rows, len(x)))

    # The state is (x, integral of the divergence), flat: (B, D + 1).
    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    [end] = ode.integrate(drift_of, start, {ode.num_steps - 1})
    z = end[:, :-1].reshape(x.shape)
    return ode.transport.prior_logp(z) + end[:, -1], z  # integrated from data to noise: the sign is turned already


def _augmented_drift(ode: ODE, model: Model, probe: Tensor, model_kwargs: dict) -> Drift:
    def drift(state: Tensor, t: Tensor) -> Tensor:
        # Also where the caller samples in inference mode: autograd takes no tensors made in it.
        with torch.inference_mode(False), torch.enable_grad():
            x = state.detach()[:, :-1].clone().reshape(probe.shape).requires_grad_()
            kwargs = {name: _outside_inference(value) for name, value in model_kwargs.items()}
            fixed = _outside_inference(probe)
            velocity = ode.transport.predict(x, _outside_inference(t), model, **kwargs).velocity
            (gradient,) = torch.autograd.grad(velocity, x, fixed)
            divergence = (gradient * fixed).flatten(1).sum(1, keepdim=True)
            return torch.cat([velocity.detach().flatten(1), divergence], dim=1)

    return drift


def _outside_inference(value):
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
