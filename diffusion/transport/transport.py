"""What a network predicts on a path, the losses that train it, and its velocity, score and data prediction.

x_data, x_noise, the velocity u_t = alpha' x_data + sigma' x_noise and the score -x_noise / sigma are linear in each other given
x_t, so whatever the network predicts, any of them is a(t) x + b(t) output. :meth:`Transport.coefficients` is that table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.guidance import varies
from diffusion.transport.options import choose, require_number
from diffusion.transport.paths import PATHS, Path

Model = Callable[..., Tensor]  # model(x, t, **kwargs): t float32 (B,) in [0, 1]

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = (None, "velocity", "likelihood")


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> "Transport":
    """path_type: Linear, GVP or VP. prediction: velocity, noise or score. loss_weight: None, "velocity" or "likelihood".

    train_eps, sample_eps: how near the ends of [0, 1] times come where the mathematics is singular there; None takes 1e-5 and
    1e-3 on VP, 0 for velocity on the other paths, else 1e-3.
    """
    path_type = choose("path_type", path_type, PATHS)
    prediction = choose("prediction", prediction, PREDICTIONS)
    loss_weight = choose("loss_weight", loss_weight, LOSS_WEIGHTS)
    regular = path_type != "VP" and prediction == "velocity"
    default_train, default_sample = (0.0, 0.0) if regular else PATHS[path_type].default_eps
    train_eps = default_train if train_eps is None else train_eps
    if loss_weight and prediction != "velocity" and train_eps == 0:
        raise ValueError(
            f"loss_weight {loss_weight} is infinite at the ends of [0, 1]: train_eps must be above 0, such as 1e-3"
        )
    return Transport(
        path_type=path_type,
        prediction=prediction,
        loss_weight=loss_weight,
        train_eps=require_number("train_eps", train_eps, 0, 0.5),
        sample_eps=require_number("sample_eps", default_sample if sample_eps is None else sample_eps, 0, 0.5),
    )


@dataclass(frozen=True)
class Transport:
    """Made by :func:`create_transport`, which checks the values. Equation numbers are SiT's."""

    path_type: str
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float

    @property
    def path(self) -> Path:
        return PATHS[self.path_type]

    def describe(self) -> dict[str, str | float | None]:
        """Plain values that :func:`create_transport` takes back, for checkpoints."""
        return {name: getattr(self, name) for name in ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")}

    # Times

    @property
    def interval(self) -> tuple[float, float]:
        """The times that are trained on."""
        return self.check_interval(self.train_eps, self.sample_eps)

    def check_interval(
        self,
        train_eps: float,
        sample_eps: float,
        *,
        diffusion_form: str = "SBDM",
        sde: bool = False,
        reverse: bool = False,
        eval: bool = False,
        last_step_size: float = 0.0,
    ) -> tuple[float, float]:
        """(t0, t1) of training, or with ``eval`` of sampling: from noise to data, or with ``reverse`` back.

        An SDE's solver stops at t1 = 1 - last_step_size, where the last step starts.
        """
        eps = sample_eps if eval else train_eps
        derived = self.prediction != "velocity"  # the velocity follows from the score, which is singular at both ends
        sbdm = sde and diffusion_form == "SBDM"
        t0 = eps if self.path.starts_at_noise and (derived or sbdm) else 0.0
        if sde and last_step_size:
            t1 = 1 - last_step_size
        elif sde or derived or not self.path.starts_at_noise:
            t1 = 1 - eps
        else:
            t1 = 1.0
        return (t1, t0) if reverse else (t0, t1)

    # Training

    def interpolate(self, t: Tensor, x_data: Tensor, x_noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the velocity u_t at times t (B,) (eq. 1 and 3)."""
        path, t = self.path, _spread(t, x_data)
        return path.alpha(t) * x_data + path.sigma(t) * x_noise, path.d_alpha(t) * x_data + path.d_sigma(t) * x_noise

    def training_losses(
        self, model: Model, x1: Tensor, model_kwargs: dict | None = None, t: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """loss (B,), the weighted mean squared error, and pred, the network's prediction like x1.

        x1: data (B, C, ...). t (B,) and noise are drawn from torch's global generator where None. Raises ValueError for a
        network with fewer channels than x1.
        """
        if t is None:
            t0, t1 = self.interval
            t = t0 + (t1 - t0) * torch.rand(len(x1), device=x1.device)
        if t.shape != x1.shape[:1]:
            raise ValueError(f"t must hold one time a sample, shape ({len(x1)},); got shape {tuple(t.shape)}")
        noise = torch.randn_like(x1) if noise is None else noise
        x_t, u_t = self.interpolate(t, x1, noise)
        out = self.call(model, x_t, t, model_kwargs)
        if self.prediction == "velocity":
            error = out - u_t
        elif self.prediction == "noise":
            error = out - noise
        else:
            error = self.path.sigma(_spread(t, out)) * out + noise
        loss = error.square().flatten(1).mean(1)
        return {"loss": loss if self.prediction == "velocity" else self._loss_weight(t) * loss, "pred": out}

    def _loss_weight(self, t: Tensor) -> Tensor:
        g, sigma = self.path.score_weight(t), self.path.sigma(t)
        if self.loss_weight == "velocity":
            return (g / sigma) ** 2
        if self.loss_weight == "likelihood":
            return g / sigma**2
        return torch.ones_like(t)

    # Predictions

    def call(self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict | None = None) -> Tensor:
        """The network's first C channels, in float32 whatever precision it works in (or in x's type if wider).

        t: (B,) or a scalar. Guidance that varies with time takes a scalar; our own solvers' grids lie on the CPU, where reading
        it waits for no device, torchdiffeq's do not.
        """
        if varies(model) and not t.ndim:
            model = model.at(t.item(), 1 - t.item())
        if t.ndim:
            batch_t = t.float()
        elif t.device == x.device:
            batch_t = t.float().expand(len(x))
        else:  # filling waits for no device
            batch_t = torch.full((len(x),), t.item(), device=x.device)
        out = model(x, batch_t, **(model_kwargs or {}))
        if out.shape[1] < x.shape[1] or out.shape[2:] != x.shape[2:] or len(out) != len(x):
            raise ValueError(
                f"the model must return at least {x.shape[1]} channels like x, {tuple(x.shape)}; got {tuple(out.shape)}"
            )
        return out[:, : x.shape[1]].to(torch.promote_types(x.dtype, torch.float32))

    def coefficients(self, quantity: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each like t, of quantity = a x + b output. quantity: velocity, score, or data (the prediction of x_data)."""
        path, zero, one = self.path, torch.zeros_like(t), torch.ones_like(t)
        if quantity == self.prediction:
            return zero, one
        alpha, sigma = path.alpha(t), path.sigma(t)
        if self.prediction == "velocity":
            determinant = path.determinant(t)
            if quantity == "score":
                return -path.d_alpha(t) / (sigma * determinant), alpha / (sigma * determinant)
            return -path.d_sigma(t) / determinant, sigma / determinant
        per_score = one if self.prediction == "score" else -1 / sigma  # score = per_score output
        if quantity == "score":
            return zero, per_score
        if quantity == "velocity":
            return path.d_log_alpha(t), path.score_weight(t) * per_score
        return 1 / alpha, sigma**2 / alpha * per_score

    def predict(self, x: Tensor, t: Tensor, model: Model, **model_kwargs) -> "Prediction":
        """Velocity, score and data prediction of ONE network call at times t, (B,) or a scalar."""
        return Prediction(self, x, t, self.call(model, x, t, model_kwargs))

    def data_from_velocity(self, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The prediction of x_data that belongs to a velocity, whatever the network predicts."""
        return Prediction(replace(self, prediction="velocity"), x, t, velocity).data

    def get_drift(self) -> Callable[..., Tensor]:
        """drift(x, t, model, **model_kwargs): the velocity, the right-hand side of the probability-flow ODE (eq. 2)."""
        return lambda x, t, model, **model_kwargs: self.predict(x, t, model, **model_kwargs).velocity

    def get_score(self) -> Callable[..., Tensor]:
        """score(x, t, model, **model_kwargs): the gradient of the log density (eq. 5)."""
        return lambda x, t, model, **model_kwargs: self.predict(x, t, model, **model_kwargs).score

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, 1) in nats, (B,)."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


@dataclass(frozen=True)
class Prediction:
    """The output of one network call at (x, t), and what follows from it, each like x and computed when asked for."""

    transport: Transport
    x: Tensor
    t: Tensor
    out: Tensor

    @property
    def velocity(self) -> Tensor:
        return self._combine("velocity")

    @property
    def score(self) -> Tensor:
        return self._combine("score")

    @property
    def data(self) -> Tensor:
        """E[x_data | x_t]: Tweedie's formula, (x + sigma^2 score) / alpha."""
        return self._combine("data")

    def _combine(self, quantity: str) -> Tensor:
        if quantity == self.transport.prediction:
            return self.out
        a, b = self.transport.coefficients(quantity, self.t)
        return scale(a, self.x) + scale(b, self.out)


def scale(coefficient: Tensor, x: Tensor) -> Tensor:
    """coefficient, (B,) or a scalar, times x (B, ...), in x's type. A scalar may lie on the CPU whatever x's device."""
    if coefficient.ndim == 0 and coefficient.device.type == "cpu":
        return coefficient.item() * x
    return _spread(coefficient, x).to(x.dtype) * x


def _spread(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) shaped (B, 1, ...) to broadcast over x."""
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t
