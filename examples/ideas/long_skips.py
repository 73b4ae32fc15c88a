"""A model: a transformer whose last blocks get what the first ones made, as in U-ViT (Bao et al. 2023, "All are Worth Words: A
ViT Backbone for Diffusion Models"), from the parts that DiT and MDTv2 are made of.

python -m examples.ideas.long_skips train_mask_adan.py --model LongSkip-Ti/2 ...
"""

from dataclasses import dataclass

from torch import Tensor, nn

from examples.ideas import run_script
from models.amm import AMM, form_at
from models.attention import Attention
from models.dit import TINY, DiTConfig
from models.layers import (
    Block,
    FinalLayer,
    GuidedNetwork,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    check_latents,
    fixed_table,
    init_weights,
)
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


class LongSkip(GuidedNetwork):
    """See :meth:`forward`. amm: the blocks whose attention is modulated in eval mode, or None."""

    def __init__(self, config: LongSkipConfig, amm: AMM | None = None):
        super().__init__()
        self.config = config
        if amm:
            amm.check(config.amm_blocks)
        width = config.width
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = fixed_table(width, config.grid)
        self.blocks = nn.ModuleList(self._block(i, form_at(amm, i)) for i in range(config.depth))
        self.final_layer = FinalLayer(width, width, config.patch_size, config.computed_channels)
        init_weights(self, config.label_std)

    def _block(self, index: int, form: str | None) -> Block:
        config = self.config
        kind = SkipBlock if index >= config.depth - config.half else Block
        attention = Attention(config.width, config.num_heads, config.grid, position_bias=None, amm=form)
        return kind(config.width, config.width, attention, config.mlp_ratio)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As :meth:`models.dit.DiT.forward`."""
        check_latents(x, self.config)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        skips = []
        for i, block in enumerate(self.blocks):
            joined = (skips.pop(),) if isinstance(block, SkipBlock) else ()
            x = block(x, c, block.attn.score_bias(), *joined)
            if i < self.config.half:
                skips.append(x)
        return self.final_layer(x, c)


def register() -> None:
    """From now on ``--model LongSkip-Ti/2`` and ``LongSkip-S/2`` are models, and their checkpoints load."""
    FAMILIES[LongSkipConfig] = Family(network=LongSkip)
    CONFIGS["LongSkip-Ti/2"] = LongSkipConfig(**TINY)
    CONFIGS["LongSkip-S/2"] = LongSkipConfig(depth=12, width=384, num_heads=6)


if __name__ == "__main__":
    register()
    cli.run(run_script)
