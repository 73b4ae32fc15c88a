"""DiT: the plain diffusion transformer (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers")."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.amm import AMM, form_at
from models.attention import Attention, BiasedAttention
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
    sizes_from_state,
)

HEAD_DIM = 64  # of the published sizes but XL


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Depth, width and number of heads; the sides of input and patch in latent pixels."""

    depth: int
    width: int
    num_heads: int
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True  # twice the channels come out: eps, then the variance's interpolation
    mlp_ratio: float = 4.0
    label_std: float = 0.02  # initialisation of the label table

    def __post_init__(self):
        for name in ("depth", "width", "num_heads", "input_size", "patch_size", "in_channels", "num_classes", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"the width {self.width} is not divisible by the number of heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be divisible by the patch side {self.patch_size}, got {self.input_size}")

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.input_size // self.patch_size

    @property
    def computed_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def out_channels(self) -> int:
        """Of the computed channels, the first so many are returned."""
        return self.computed_channels

    @property
    def amm_blocks(self) -> range:
        """Where AMM can be: the blocks with plain attention."""
        return range(self.depth)


# Published figures are in models.registry.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
PATCH_SIDES = (2, 4, 8)
# Ours, for one CPU and tiny images. A label table of standard deviation 0.02 is hardly learnt in a short training.
TINY = {
    "depth": 4, "width": 96, "num_heads": 3, "input_size": 16, "in_channels": 3, "num_classes": 10, "label_std": 1.0
}  # fmt: skip

DIT_CONFIGS = {
    f"DiT-{size}/{patch_size}": DiTConfig(depth=depth, width=width, num_heads=num_heads, patch_size=patch_size)
    for size, (depth, width, num_heads) in SIZES.items()
    for patch_size in PATCH_SIDES
}
DIT_CONFIGS["DiT-Ti/2"] = DiTConfig(**TINY)


def is_dit_state(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has the keys of a DiT, which are those of a SiT with plain attention as well."""
    outside = {key.split(".")[0] for key in state}
    expected = {"pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"}
    foreign = ("rel_pos_bias", ".an_bias")
    return outside == expected and not any(part in key for key in state for part in foreign)


def config_from_state(state: dict[str, Tensor]) -> DiTConfig:
    """Infer a DiT's config from the keys and shapes of its state dict.

    The heads leave no trace in plain attention: they are the registered model's of that width, else width / 64. Raises
    ValueError for missing keys, and where the heads cannot be told.
    """
    sizes = sizes_from_state(state)
    return DiTConfig(depth=count_blocks(state), num_heads=usual_heads(sizes["width"]), **sizes)


def count_blocks(state: dict[str, Tensor], group: str = "blocks") -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{group}.")})


def usual_heads(width: int) -> int:
    """Of plain attention so wide."""
    for config in DIT_CONFIGS.values():
        if config.width == width:
            return config.num_heads
    if width % HEAD_DIM:
        raise ValueError(
            f"plain attention {width} wide: its weights do not tell the number of heads, and no registered DiT has that width; "
            "only a checkpoint that states its config can be read"
        )
    return width // HEAD_DIM


class DiT(GuidedNetwork):
    """See :meth:`forward`. amm: the blocks whose attention is modulated in eval mode, or None."""

    def __init__(self, config: DiTConfig, amm: AMM | None = None):
        super().__init__()
        self.config = config
        if amm:
            amm.check(config.amm_blocks)
        width = config.width
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = fixed_table(width, config.grid)
        self.blocks = nn.ModuleList(self._block(i, amm) for i in range(config.depth))
        self.final_layer = FinalLayer(width, width, config.patch_size, config.computed_channels)
        init_weights(self, config.label_std)

    def _block(self, index: int, amm: AMM | None) -> Block:
        width = self.config.width
        return Block(width, width, self._attention(index, amm), self.config.mlp_ratio)

    def _attention(self, block: int, amm: AMM | None) -> BiasedAttention:
        config = self.config
        return Attention(config.width, config.num_heads, config.grid, position_bias=None, amm=form_at(amm, block))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance (or what else the network is trained for).

        x: (B, C, S, S) noisy latents. t: (B,) timesteps in [0, 1000), for a transport times in [0, 1]. y: (B,) labels,
        num_classes for "none". Returns (B, ``config.out_channels``, S, S). Raises ValueError for latents of another shape
        than the model's.
        """
        check_latents(x, self.config)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        return self.final_layer(self._through_blocks(x, c), c)[:, : self.config.out_channels]

    def _through_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D) tokens, c (B, D) conditions -> (B, N, D)."""
        for block in self.blocks:
            x = block(x, c, block.attn.score_bias())
        return x
