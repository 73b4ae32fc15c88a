"""A transport path: the straight line from noise to data, passed through more slowly near the noise (the timestep shift of
Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", as a path).

python -m examples.ideas.shifted_path train_mask_adan.py --model SiT-Ti/2 --path-type Shifted ...
"""

from torch import Tensor

from diffusion.transport.paths import PATHS, Path
from examples.ideas import run_script
from runtime import cli

SHIFT = 3.0  # theirs for 1024 pixels


class ShiftedPath(Path):
    """(t / n, shift (1 - t) / n) with n = t + shift (1 - t): the linear path at the time t / n."""

    def __init__(self, shift: float):
        self.shift = shift

    def _norm(self, t: Tensor) -> Tensor:
        return t + self.shift * (1 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return t / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * (1 - t) / self._norm(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.shift / self._norm(t) ** 2

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)


def register() -> None:
    """From now on ``--path-type Shifted`` is a path, and checkpoints that state it load."""
    PATHS["Shifted"] = ShiftedPath(SHIFT)


if __name__ == "__main__":
    register()
    cli.run(run_script)
