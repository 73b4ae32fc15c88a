"""SiT: DiT's network for interpolants (Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with
Scalable Interpolant Transformers"), with plain attention or with attention mediators (Pu et al. 2024)."""

from dataclasses import dataclass

from torch import Tensor

from models.amm import AMM
from models.attention import BiasedAttention
from models.dit import PATCH_SIDES, SIZES, TINY, DiT, DiTConfig, count_blocks, is_dit_state, usual_heads
from models.layers import sizes_from_state
from models.mediators import MediatorAttention, mediator_side


@dataclass(frozen=True, kw_only=True)
class SiTConfig(DiTConfig):
    """As :class:`DiTConfig`; a transport has no use for the second half of the channels, which learn_sigma computes."""

    keep_sigma: bool = False  # return that half too: Gaussian diffusion reads the variance from it
    mediator_num: int | None = None  # mediator tokens, a square number; None: plain attention
    mediator_layers: int | None = None  # how many of the first blocks have mediators; None: all

    def __post_init__(self):
        super().__post_init__()
        if self.keep_sigma and not self.learn_sigma:
            raise ValueError("keep_sigma=True returns channels that learn_sigma=False does not compute: change one of them")
        if self.mediator_num is not None:
            mediator_side(self.mediator_num, self.grid)
        elif self.mediator_layers is not None:
            raise ValueError(f"mediator_layers={self.mediator_layers} needs mediator_num: how many mediators these blocks have")
        if self.mediator_layers is not None and not 0 < self.mediator_layers <= self.depth:
            raise ValueError(
                f"mediator_layers must be 1 to {self.depth}, the depth, or None for all, got {self.mediator_layers}"
            )

    @property
    def mediator_depth(self) -> int:
        """How many of the first blocks have mediators."""
        return 0 if self.mediator_num is None else self.mediator_layers or self.depth

    @property
    def out_channels(self) -> int:
        return self.computed_channels if self.keep_sigma else self.in_channels

    @property
    def amm_blocks(self) -> range:
        return range(self.mediator_depth, self.depth)


SIT_CONFIGS = {
    f"SiT-{size}/{patch_size}": SiTConfig(depth=depth, width=width, num_heads=num_heads, patch_size=patch_size)
    for size, (depth, width, num_heads) in SIZES.items()
    for patch_size in PATCH_SIDES
}
SIT_CONFIGS["SiT-Ti/2"] = SiTConfig(**TINY)


def is_sit_state(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has SiT's keys and no others; with plain attention they are also DiT's."""
    return is_dit_state({key: value for key, value in state.items() if not key.endswith(".attn.an_bias")})


def config_from_state(state: dict[str, Tensor]) -> SiTConfig:
    """Infer a SiT's config from the keys and shapes of its state dict.

    The heads are read from the mediators' tables, and where there are none guessed as a DiT's. keep_sigma is off. Raises
    ValueError for missing keys, for blocks that do not fit one another, and where the heads cannot be told.
    """
    sizes, depth = sizes_from_state(state), count_blocks(state)
    mediators = [f"blocks.{i}.attn.an_bias" in state for i in range(depth)]
    mediator_depth = sum(mediators)
    if not all(mediators[:mediator_depth]):
        raise ValueError(
            f"mediators in blocks {[i for i, has in enumerate(mediators) if has]}: a SiT has them in its first blocks"
        )
    if mediator_depth:
        num_heads, mediator_num = state["blocks.0.attn.an_bias"].shape[:2]
    else:
        num_heads, mediator_num = usual_heads(sizes["width"]), None
    return SiTConfig(
        depth=depth,
        num_heads=num_heads,
        mediator_num=mediator_num,
        mediator_layers=mediator_depth if 0 < mediator_depth < depth else None,
        **sizes,
    )


class SiT(DiT):
    """See :meth:`DiT.forward`: it predicts the velocity, or what else the network is trained for, (B, C, S, S), with
    keep_sigma (B, 2C, S, S). amm: blocks with plain attention whose attention is modulated in eval mode, or None."""

    def _attention(self, block: int, amm: AMM | None) -> BiasedAttention:
        config = self.config
        if block < config.mediator_depth:
            return MediatorAttention(config.width, config.num_heads, config.grid, config.mediator_num)
        return super()._attention(block, amm)
