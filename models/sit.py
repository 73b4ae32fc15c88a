"""SiT: a diffusion transformer for interpolants (Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models
with Scalable Interpolant Transformers"), with plain attention or with attention mediators (Pu et al. 2024)."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from models.amm import AMM
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
)
from models.mediators import MediatorAttention, mediator_side

HEAD_DIM = 64  # of the published sizes but XL


@dataclass(frozen=True, kw_only=True)
class SiTConfig:
    """Depth, width and number of heads; the sides of input and patch in latent pixels."""

    depth: int
    width: int
    num_heads: int
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True  # the network computes twice the channels; a transport has no use for the second half
    keep_sigma: bool = False  # return that half too: Gaussian diffusion reads the variance from it
    mlp_ratio: float = 4.0
    mediator_num: int | None = None  # mediator tokens, a square number; None: plain attention
    mediator_layers: int | None = None  # how many of the first blocks have mediators; None: all
    label_std: float = 0.02  # initialisation of the label table

    def __post_init__(self):
        for name in ("depth", "width", "num_heads", "input_size", "patch_size", "in_channels", "num_classes", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"the width {self.width} is not divisible by the number of heads {self.num_heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size must be divisible by the patch side {self.patch_size}, got {self.input_size}")
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
    def grid(self) -> int:
        """Tokens per side."""
        return self.input_size // self.patch_size

    @property
    def mediator_depth(self) -> int:
        """How many of the first blocks have mediators."""
        return 0 if self.mediator_num is None else self.mediator_layers or self.depth

    @property
    def computed_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def out_channels(self) -> int:
        return self.computed_channels if self.keep_sigma else self.in_channels


# Published figures are in models.registry.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads: DiT's

SIT_CONFIGS = {
    f"SiT-{size}/{patch_size}": SiTConfig(depth=depth, width=width, num_heads=num_heads, patch_size=patch_size)
    for size, (depth, width, num_heads) in SIZES.items()
    for patch_size in (2, 4, 8)
}
# Ours, for one CPU and tiny images. A label table of standard deviation 0.02 is hardly learnt in a short training.
SIT_CONFIGS["SiT-Ti/2"] = SiTConfig(
    depth=4, width=96, num_heads=3, input_size=16, in_channels=3, num_classes=10, label_std=1.0
)  # fmt: skip


def is_sit_state(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has SiT's keys and no others. DiT's are the same: nothing in a bare state dict tells them apart."""
    outside = {key.split(".")[0] for key in state}
    expected = {"pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"}
    return outside == expected and not any("rel_pos_bias" in key for key in state)


def config_from_state(state: dict[str, Tensor]) -> SiTConfig:
    """Infer a SiT's config from the keys and shapes of its state dict.

    The heads are read from the mediators' tables. Plain attention leaves no trace of them: they are the registered model's of
    that width, else width / 64. keep_sigma is off. Raises ValueError for missing keys, for blocks that do not fit one another,
    and where the heads cannot be told.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.bias")
    missing = [key for key in (*needed, "blocks.0.mlp.fc1.bias", "blocks.0.attn.qkv.weight") if key not in state]
    if missing:
        raise ValueError(f"the weights of a SiT lack {', '.join(missing)}")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    width, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    mediators = [f"blocks.{i}.attn.an_bias" in state for i in range(depth)]
    mediator_depth = sum(mediators)
    if not all(mediators[:mediator_depth]):
        raise ValueError(
            f"mediators in blocks {[i for i, has in enumerate(mediators) if has]}: a SiT has them in its first blocks"
        )
    num_heads, mediator_num = state["blocks.0.attn.an_bias"].shape[:2] if mediator_depth else (_usual_heads(width), None)
    return SiTConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        input_size=math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=len(state["final_layer.linear.bias"]) == 2 * in_channels * patch_size**2,
        mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / width,
        mediator_num=mediator_num,
        mediator_layers=mediator_depth if 0 < mediator_depth < depth else None,
    )


def _usual_heads(width: int) -> int:
    for config in SIT_CONFIGS.values():
        if config.width == width:
            return config.num_heads
    if width % HEAD_DIM:
        raise ValueError(
            f"plain attention {width} wide: its weights do not tell the number of heads, and no registered SiT has that width; "
            "only a checkpoint that states its config can be read"
        )
    return width // HEAD_DIM


class SiT(GuidedNetwork):
    """See :meth:`forward`. amm: blocks with plain attention whose attention is modulated in eval mode, or None."""

    def __init__(self, config: SiTConfig, amm: AMM | None = None):
        super().__init__()
        self.config = config
        if amm and not set(amm.blocks) <= set(range(config.mediator_depth, config.depth)):
            plain = f"{config.mediator_depth} to {config.depth - 1}" if config.mediator_depth < config.depth else "none"
            raise ValueError(f"AMM at block(s) {amm.blocks}: of this model's blocks, those with plain attention are {plain}")
        width = config.width
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = fixed_table(width, config.grid)
        self.blocks = nn.ModuleList(
            Block(width, width, self._attention(i, amm), config.mlp_ratio) for i in range(config.depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(width, width, config.patch_size, config.computed_channels)
        init_weights(self, config.label_std)

    def _attention(self, block: int, amm: AMM | None) -> BiasedAttention:
        config = self.config
        if block < config.mediator_depth:
            return MediatorAttention(config.width, config.num_heads, config.grid, config.mediator_num)
        form = amm.form if amm and block in amm.blocks else None
        return Attention(config.width, config.num_heads, config.grid, position_bias=False, amm=form)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity (or what else the network is trained for).

        x: (B, C, S, S) noisy latents. t: (B,) times, in [0, 1] for a transport. y: (B,) labels, num_classes for "none".
        Returns (B, C, S, S), or (B, 2C, S, S) with keep_sigma. Raises ValueError for latents of another shape than the model's.
        """
        check_latents(x, self.config)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, block.attn.score_bias())
        return self.final_layer(x, c)[:, : self.config.out_channels]
