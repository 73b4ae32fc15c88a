"""Which timesteps are trained on: uniformly, or in proportion to the loss's second moment (Nichol & Dhariwal 2021, sec.
3.3)."""

import numpy as np

from diffusion.schedule import NUM_TIMESTEPS


class UniformSampler:
    """Every timestep with the same probability; importance weights 1."""

    learns = False  # whether update() needs the losses

    def __init__(self, num_timesteps: int = NUM_TIMESTEPS):
        self.num_timesteps = num_timesteps

    def probabilities(self) -> np.ndarray:
        """(T,), summing to 1."""
        return np.full(self.num_timesteps, 1 / self.num_timesteps)

    def sample(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map U(0, 1) draws (B,) to timesteps (int64) and importance weights 1/(T p) (float32): a pure function of the
        sampler's state."""
        p = self.probabilities()
        cumulative = np.cumsum(p)
        t = np.searchsorted(cumulative / cumulative[-1], uniforms, side="right").clip(max=self.num_timesteps - 1)
        return t.astype(np.int64), (1 / (self.num_timesteps * p[t])).astype(np.float32)

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        """Learn from the unweighted losses (B,) of a step's global batch."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


class LossSecondMomentSampler(UniformSampler):
    """p proportional to sqrt(mean loss^2) over each timestep's last losses, mixed with a little of the uniform distribution.

    It is uniform until every timestep has ``history_per_term`` losses.
    """

    learns = True

    def __init__(self, num_timesteps: int = NUM_TIMESTEPS, history_per_term: int = 10, uniform_probability: float = 0.001):
        super().__init__(num_timesteps)
        self.uniform_probability = uniform_probability
        # A ring of the last losses: their order does not matter for the mean.
        self._history = np.zeros((num_timesteps, history_per_term), np.float64)
        self._counts = np.zeros(num_timesteps, np.int64)

    def probabilities(self) -> np.ndarray:
        if self._counts.min() < self._history.shape[1]:
            return super().probabilities()
        p = np.sqrt(np.square(self._history).mean(1))
        if not p.any():
            return super().probabilities()
        return p / p.sum() * (1 - self.uniform_probability) + self.uniform_probability / self.num_timesteps

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        """Losses that are not finite are left out: one of them would spoil every probability from then on."""
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            if not np.isfinite(loss):
                continue
            self._history[t, self._counts[t] % self._history.shape[1]] = loss
            self._counts[t] += 1

    def state_dict(self) -> dict:
        return {"history": self._history.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict) -> None:
        history = np.asarray(state["history"], np.float64)
        if history.shape != self._history.shape:
            raise ValueError(f"the timestep sampler's history has shape {history.shape}, expected {self._history.shape}")
        self._history, self._counts = history, np.asarray(state["counts"], np.int64)


class ContinuousSampler:
    """Times uniform on [t0, t1], for networks that take continuous time; importance weights 1. As :class:`UniformSampler`."""

    learns = False

    def __init__(self, t0: float, t1: float):
        self.t0, self.t1 = t0, t1

    def sample(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map U(0, 1) draws (B,) to times and weights, both float32."""
        t = self.t0 + (self.t1 - self.t0) * np.asarray(uniforms, np.float64)
        return t.astype(np.float32), np.ones(len(t), np.float32)

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
