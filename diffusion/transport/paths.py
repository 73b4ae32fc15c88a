"""Paths x_t = alpha(t) x_data + sigma(t) x_noise from noise (t = 0) to data (t = 1), and the forms of the diffusion on them.

Every function maps times of any shape and float type to coefficients of the same shape and type.
"""

import math
from collections.abc import Callable

from torch import Tensor


class Path:
    """What all paths share; SiT eq. 1 to 5 with time reversed: here data is at t = 1."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    starts_at_noise = True  # alpha(0) = 0: the score's part in the velocity is infinite at t = 0
    default_eps = (1e-3, 1e-3)  # (training, sampling) distance to the singular ends

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return self.d_alpha(t) / self.alpha(t)

    def score_weight(self, t: Tensor) -> Tensor:
        """g in velocity = d_log_alpha x + g score."""
        return self.d_log_alpha(t) * self.sigma(t) ** 2 - self.sigma(t) * self.d_sigma(t)

    def determinant(self, t: Tensor) -> Tensor:
        """alpha' sigma - alpha sigma': of the linear map from (x_data, x_noise) to (u_t, x_t)."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)


class LinearPath(Path):
    """(t, 1 - t)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -t.new_ones(t.shape)


class GVPPath(Path):
    """Generalised variance preserving: (sin, cos) of t pi/2."""

    def alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (math.pi / 2 * t).cos()

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * (math.pi / 2 * t).sin()

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return math.pi / (2 * (math.pi / 2 * t).tan())


class VPPath(Path):
    """The variance-preserving diffusion of Song et al. 2021 (eq. 33), beta from 20 (noise) to 0.1 (data), with 1 - t as its
    time. It does not quite start at noise: alpha(0) = 0.0066."""

    BETA_MIN, BETA_MAX = 0.1, 20.0
    starts_at_noise = False
    default_eps = (1e-5, 1e-3)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.BETA_MAX - self.BETA_MIN) - 0.5 * (1 - t) * self.BETA_MIN

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-(2 * self._log_alpha(t)).expm1()).sqrt()  # sqrt(1 - alpha^2), exact where alpha is nearly 1

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return (self.BETA_MIN + (self.BETA_MAX - self.BETA_MIN) * (1 - t)) / 2

    def score_weight(self, t: Tensor) -> Tensor:
        return self.d_log_alpha(t)  # as alpha^2 + sigma^2 = 1

    def determinant(self, t: Tensor) -> Tensor:
        return self.d_alpha(t) / self.sigma(t)


PATHS: dict[str, Path] = {"Linear": LinearPath(), "GVP": GVPPath(), "VP": VPPath()}

# w(t) of the SDE dx = (velocity + w score) dt + sqrt(2 w) dW, from the path, the time and the norm c (SiT table 2).
DIFFUSION_FORMS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, c: t.new_full(t.shape, c),
    "SBDM": lambda path, t, c: c * path.score_weight(t),
    "sigma": lambda path, t, c: c * path.sigma(t),
    "linear": lambda path, t, c: c * (1 - t),
    "decreasing": lambda path, t, c: 0.25 * (c * (math.pi * t).cos() + 1) ** 2,
    "increasing-decreasing": lambda path, t, c: c * (math.pi * t).sin() ** 2,
}
PUBLISHED_SPELLINGS = {"inccreasing-decreasing": "increasing-decreasing"}
