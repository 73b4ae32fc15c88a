"""Gaussian diffusion with noise prediction and a learned-range variance.

Equation numbers: DDPM is Ho et al. 2020, iDDPM is Nichol & Dhariwal 2021, DDIM is Song et al. 2021, min-SNR is Hang et al.
2023. The network is any callable ``model(x, t, **model_kwargs) -> (B, 2C, ...)``: the noise, then the variance's interpolation
v in [-1, 1]. It receives timesteps of the original 1000-step scale whatever the respacing.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.guidance import varies
from diffusion.schedule import NUM_TIMESTEPS, linear_betas, respace_betas, space_timesteps

Model = Callable[..., Tensor]
StepNoise = Callable[[int], Tensor]  # k = 1, 2, ...: the noise added after solver step k, of the sample's shape


def create_diffusion(timestep_respacing: str = "", *, min_snr_gamma: float | None = None) -> "GaussianDiffusion":
    """The linear 1000-step process, respaced (see :func:`diffusion.schedule.space_timesteps`); min_snr_gamma=5 is EDT's loss
    weight."""
    kept = space_timesteps(timestep_respacing)
    return GaussianDiffusion(respace_betas(linear_betas(NUM_TIMESTEPS), kept), kept, min_snr_gamma=min_snr_gamma)


class GaussianDiffusion:
    """betas: float64 (T,). timestep_map: the T original timesteps behind them.

    min_snr_gamma: weigh the mse of timestep t by min(SNR, gamma)/SNR (min-SNR eq. 6, noise prediction); None: weight 1.
    """

    def __init__(self, betas: np.ndarray, timestep_map: list[int], *, min_snr_gamma: float | None = None):
        self.betas = betas
        self.timestep_map = list(timestep_map)
        self.num_timesteps = len(betas)
        self.min_snr_gamma = min_snr_gamma
        self.alphas_cumprod = a = np.cumprod(1.0 - betas)
        a_prev = np.append(1.0, a[:-1])
        posterior_variance = betas * (1.0 - a_prev) / (1.0 - a)  # DDPM eq. 7
        # At t = 0 the posterior is a point; its log takes the value of t = 1 (of itself when there is one step only).
        floor = posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        snr = a / (1.0 - a)
        coefficients = {
            "sqrt_a": np.sqrt(a),
            "sqrt_one_minus_a": np.sqrt(1.0 - a),
            "sqrt_recip_a": np.sqrt(1.0 / a),
            "sqrt_recip_a_minus_1": np.sqrt(1.0 / a - 1.0),
            "posterior_x0": betas * np.sqrt(a_prev) / (1.0 - a),
            "posterior_xt": (1.0 - a_prev) * np.sqrt(1.0 - betas) / (1.0 - a),
            "min_log_variance": np.log(np.append(floor, posterior_variance[1:])),
            "max_log_variance": np.log(betas),
            "a": a,
            "a_prev": a_prev,
            "mse_weight": np.ones_like(a) if min_snr_gamma is None else np.minimum(snr, min_snr_gamma) / snr,
        }
        self._rows = {name: row for row, name in enumerate(coefficients)}
        self._host_table = torch.from_numpy(np.stack(list(coefficients.values()))).float()  # from float64, (rows, T)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The coefficient table and the timestep map on a device, copied there once."""
        if device not in self._tables:
            self._tables[device] = self._host_table.to(device), torch.tensor(self.timestep_map, device=device)
        return self._tables[device]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A coefficient at timesteps t (B,), shaped (B, 1, ...) to broadcast over ``like``."""
        return self._on(t.device)[0][self._rows[name]][t].view(-1, *[1] * (like.ndim - 1))

    def call(self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Tensor:
        """The network at timesteps t (B,) of THIS process, in float32 whatever precision the network works in."""
        out = model(x, self._on(t.device)[1][t], **(model_kwargs or {}))
        if out.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"the model must return {2 * x.shape[1]} channels (noise and variance), got {out.shape[1]}")
        return out.float()

    def network_at(self, model: Model, i: int) -> Model:
        """What to call at timestep i of THIS process: guidance may vary with time."""
        original = self.timestep_map[i]
        return model.at(original, original / NUM_TIMESTEPS) if varies(model) else model

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_0 (DDPM eq. 4)."""
        return self._at("sqrt_a", t, x0) * x0 + self._at("sqrt_one_minus_a", t, x0) * noise

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self._at("posterior_x0", t, x_t) * x0 + self._at("posterior_xt", t, x_t) * x_t

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._at("sqrt_recip_a", t, x_t) * x_t - self._at("sqrt_recip_a_minus_1", t, x_t) * eps

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = False, model_kwargs: dict | None = None
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): mean, variance, log_variance and pred_xstart, each like x. clip_denoised: clamp x_0 to [-1, 1]."""
        return self._mean_variance(self.call(model, x, t, model_kwargs), x, t, clip_denoised)

    def _mean_variance(self, out: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        eps, v = out.chunk(2, dim=1)
        fraction = (v + 1) / 2
        low, high = self._at("min_log_variance", t, x), self._at("max_log_variance", t, x)
        log_variance = fraction * high + (1 - fraction) * low  # iDDPM eq. 15
        x0 = self.predict_x0(x, t, eps)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = self.q_posterior_mean(x0, x, t)
        return {"mean": mean, "variance": log_variance.exp(), "log_variance": log_variance, "pred_xstart": x0}

    def training_losses(
        self, model: Model, x0: Tensor, t: Tensor, model_kwargs: dict | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """loss = mse + vb, and its two parts, each (B,): the (weighted) noise error, and the variational bound in bits per
        dimension, which trains the variance only: it sees a detached mean (iDDPM sec. 3.1)."""
        noise = torch.randn_like(x0) if noise is None else noise
        x_t = self.q_sample(x0, t, noise)
        out = self.call(model, x_t, t, model_kwargs)
        eps, v = out.chunk(2, dim=1)
        vb = self._bound(torch.cat([eps.detach(), v], dim=1), x0, x_t, t)
        mse = (noise - eps).square().flatten(1).mean(1) * self._at("mse_weight", t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _bound(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound, bits per dimension, (B,): KL(q || p) for t > 0, -log p(x_0 | x_1) at t = 0."""
        p = self._mean_variance(out, x_t, t, clip_denoised=False)
        q_mean, q_log = self.q_posterior_mean(x0, x_t, t), self._at("min_log_variance", t, x0)
        p_mean, p_log = p["mean"], p["log_variance"]
        kl = 0.5 * (p_log - q_log - 1 + (q_log - p_log).exp() + (q_mean - p_mean).square() * (-p_log).exp())
        nll = -discretized_gaussian_log_likelihood(x0, p_mean, 0.5 * p_log)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step x_t -> x_{t-1} (DDPM algorithm 2); at t = 0 no noise is added. Returns sample and pred_xstart."""
        p = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        step = (0.5 * p["log_variance"]).exp() * noise
        return {"sample": p["mean"] + step * (t != 0).view(-1, *[1] * (x.ndim - 1)), "pred_xstart": p["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step (DDIM eq. 12, sigma of eq. 16); eta > 0 needs noise. Returns sample and pred_xstart."""
        eps = self.call(model, x, t, model_kwargs).chunk(2, dim=1)[0]
        x0 = self.predict_x0(x, t, eps)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
            eps = (self._at("sqrt_recip_a", t, x) * x - x0) / self._at("sqrt_recip_a_minus_1", t, x)
        a, a_prev = self._at("a", t, x), self._at("a_prev", t, x)
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        sample = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * eps
        if eta:
            sample = sample + sigma * noise * (t != 0).view(-1, *[1] * (x.ndim - 1))
        return {"sample": sample, "pred_xstart": x0}

    def p_sample_loop_progressive(
        self,
        model: Model,
        noise: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict | None = None,
        step_noise: StepNoise | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Ancestral sampling from ``noise``, yielding sample and pred_xstart after every step.

        step_noise(k) gives the noise added after step k = 1, 2, ..., so that a caller can make it a function of each sample.
        """

        def step(asked: Model, x: Tensor, t: Tensor, added: Tensor) -> dict[str, Tensor]:
            return self.p_sample(asked, x, t, added, clip_denoised, model_kwargs)

        return self._steps(step, model, noise, step_noise, draws=True)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        noise: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict | None = None,
        step_noise: StepNoise | None = None,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """DDIM from ``noise``; as :meth:`p_sample_loop_progressive`. With eta = 0 nothing is drawn."""

        def step(asked: Model, x: Tensor, t: Tensor, added: Tensor | None) -> dict[str, Tensor]:
            return self.ddim_sample(asked, x, t, added, clip_denoised, model_kwargs, eta)

        return self._steps(step, model, noise, step_noise, draws=bool(eta))

    def _steps(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        noise: Tensor,
        step_noise: StepNoise | None,
        draws: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """step(network, x, t, added noise) from t = T-1 to 0. draws: whether it wants noise."""
        x = noise
        for k, i in enumerate(reversed(range(self.num_timesteps)), start=1):
            t = torch.full((len(x),), i, device=x.device)
            added = None if not draws else step_noise(k).to(x.device) if step_noise else torch.randn_like(x)
            out = step(self.network_at(model, i), x, t, added)
            yield out
            x = out["sample"]

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], noise: Tensor | None = None, **kwargs) -> Tensor:
        """The last sample of :meth:`p_sample_loop_progressive`. noise None: drawn on the CPU from torch's global generator."""
        return _last(self.p_sample_loop_progressive(model, torch.randn(shape) if noise is None else noise, **kwargs))

    def ddim_sample_loop(self, model: Model, shape: tuple[int, ...], noise: Tensor | None = None, **kwargs) -> Tensor:
        """The last sample of :meth:`ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model, torch.randn(shape) if noise is None else noise, **kwargs))


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    return deque(steps, maxlen=1)[0]["sample"]


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log-probability (nats, like x) of x in bins of width 2/255 under a Gaussian; the outermost bins reach to infinity (DDPM
    eq. 13).

    The normal CDF is approximated by 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))); probabilities are clamped at 1e-12.
    """
    inverse_std = (-log_std).exp()
    upper = _approximate_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _approximate_cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
