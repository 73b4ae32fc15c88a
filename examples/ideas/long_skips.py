"""A model: a transformer whose last blocks get what the first ones made, as in U-ViT (Bao et al. 2023, "All are Worth Words: A
ViT Backbone for Diffusion Models"), from the parts that DiT and MDTv2 are made of.

python -m examples.ideas.long_skips train_mask_adan.py --model LongSkip-Ti/2 ...
"""

from dataclasses import dataclass

from torch import Tensor

from examples.ideas import run_script
from models.amm import AMM
from models.dit import TINY, DiT, DiTConfig
from models.layers import Block
from models.mdt import SkipBlock
from models.registry import CONFIGS, FAMILIES, Family
from runtime import cli


@dataclass(frozen=True, kw_only=True)
class LongSkipConfig(DiTConfig):
    """As :class:`DiTConfig`."""

    @property
    def half(self) -> int:
        """How many of the last blocks have a skip connection from as many first ones."""
        return self.depth // 2


class LongSkip(DiT):
    """See :meth:`DiT.forward`: the last blocks are also given what the first ones returned, the last first."""

    def _block(self, index: int, amm: AMM | None) -> Block:
        config = self.config
        if index < config.depth - config.half:
            return super()._block(index, amm)
        return SkipBlock(config.width, config.width, self._attention(index, amm), config.mlp_ratio)

    def _through_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.blocks):
            joined = (skips.pop(),) if isinstance(block, SkipBlock) else ()
            x = block(x, c, block.attn.score_bias(), *joined)
            if i < self.config.half:
                skips.append(x)
        return x


def register() -> None:
    """From now on ``--model LongSkip-Ti/2`` and ``LongSkip-S/2`` are models, and their checkpoints load."""
    FAMILIES[LongSkipConfig] = Family(network=LongSkip)
    CONFIGS["LongSkip-Ti/2"] = LongSkipConfig(**TINY)
    CONFIGS["LongSkip-S/2"] = LongSkipConfig(depth=12, width=384, num_heads=6)


if __name__ == "__main__":
    register()
    cli.run(run_script)
