"""An attention: in every second block of a DiT each token sees its window of the grid only (Liu et al. 2021, "Swin
Transformer", without its shift).

python -m examples.ideas.window_attention train_mask_adan.py --model DiT-Ti/2-window ...
"""

from dataclasses import dataclass

from torch import Tensor

from examples.ideas import run_script
from models.amm import AMM
from models.attention import BiasedAttention, attend
from models.dit import TINY, DiT, DiTConfig
from models.registry import CONFIGS, FAMILIES, Family
from runtime import cli


class WindowAttention(BiasedAttention):
    """Self-attention within windows of window x window tokens: O(N window^2 D) instead of O(N^2 D)."""

    def __init__(self, width: int, num_heads: int, grid: int, window: int):
        super().__init__(width, num_heads)
        self.grid, self.window = grid, window

    def forward(self, x: Tensor, bias: None) -> Tensor:
        """x (B, N, D) -> (B, N, D). bias: what ``score_bias()`` returned; these windows have none."""
        windows = self._cut(x)  # (B n_w^2, window^2, D)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(windows).chunk(3, dim=2))
        out = self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))
        return self._join(out, len(x))

    def _cut(self, x: Tensor) -> Tensor:
        number, side = self.grid // self.window, self.window
        return x.unflatten(1, (number, side, number, side)).transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def _join(self, windows: Tensor, batch: int) -> Tensor:
        number, side = self.grid // self.window, self.window
        return windows.view(batch, number, number, side, side, -1).transpose(2, 3).flatten(1, 4)


@dataclass(frozen=True, kw_only=True)
class WindowDiTConfig(DiTConfig):
    """As :class:`DiTConfig`, and the windows' side in tokens."""

    window: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1 or self.grid % self.window:
            raise ValueError(f"window must divide the token grid's side {self.grid}, got {self.window}")

    @property
    def amm_blocks(self) -> range:
        return range(1, self.depth, 2)


class WindowDiT(DiT):
    """See :meth:`DiT.forward`: blocks 0, 2, ... attend within windows, the others to all tokens."""

    def _attention(self, block: int, amm: AMM | None) -> BiasedAttention:
        config = self.config
        if block % 2:
            return super()._attention(block, amm)
        return WindowAttention(config.width, config.num_heads, config.grid, config.window)


def register() -> None:
    """From now on ``--model DiT-Ti/2-window`` and ``DiT-S/2-window`` are models, and their checkpoints load."""
    FAMILIES[WindowDiTConfig] = Family(network=WindowDiT, size_fields=("depth", "width", "patch_size", "window"))
    CONFIGS["DiT-Ti/2-window"] = WindowDiTConfig(**TINY)
    CONFIGS["DiT-S/2-window"] = WindowDiTConfig(depth=12, width=384, num_heads=6)


if __name__ == "__main__":
    register()
    cli.run(run_script)
