"""EDT: a U-shaped diffusion transformer (Chen et al. 2024, "EDT: An Efficient Diffusion Transformer Framework Inspired by
Human-like Sketching").

Five stages: two go down (each followed by a 2x2 token merge), one stays in the middle, two go up again with skip connections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.amm import AMM, form_at
from models.attention import Attention, RelativePositionBias
from models.layers import (
    AdaLN,
    Block,
    FinalLayer,
    GuidedNetwork,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    check_latents,
    fixed_table,
    init_weights,
    modulate,
    normalize,
    sizes_from_state,
)

NUM_STAGES = 5


@dataclass(frozen=True, kw_only=True)
class Stage:
    depth: int
    width: int
    num_heads: int
    grid: int  # tokens per side


class MaskPlace(NamedTuple):
    """A place of the masked pass: tokens before it are dropped with one probability ~ U(low, high) per pass."""

    num_tokens: int
    low: float
    high: float

    def kept(self, uniforms: Tensor, share: float) -> Tensor:
        """U(0, 1) draws (b, num_tokens) -> which tokens are kept, bool alike: each is dropped for itself, with the
        probability ``share``."""
        return uniforms >= share


@dataclass(frozen=True, kw_only=True)
class EDTConfig:
    """Depth, width and number of heads of the stages down, down, middle, up, up; the sides of input and patch in latent
    pixels."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_heads: tuple[int, ...]
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True  # twice the channels come out: eps, then the variance's interpolation
    mlp_ratio: float = 4.0
    early_mask_block: int | None = None  # masked pass: also replace tokens by the position table before this block of stage 0
    label_std: float = 0.02  # initialisation of the label table

    def __post_init__(self):
        for name in ("depths", "widths", "num_heads"):
            value = getattr(self, name)
            value = (value,) * NUM_STAGES if isinstance(value, int) else tuple(value)
            if len(value) != NUM_STAGES or not all(isinstance(number, int) and number > 0 for number in value):
                raise ValueError(f"{name} must be {NUM_STAGES} positive whole numbers, one a stage, got {value}")
            object.__setattr__(self, name, value)
        for name in ("input_size", "patch_size", "in_channels", "num_classes", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.input_size % (4 * self.patch_size):
            raise ValueError(
                f"EDT halves its token grid twice: input_size must be divisible by {4 * self.patch_size}, got {self.input_size}"
            )
        if self.widths[0] != self.widths[4] or self.widths[1] != self.widths[3]:
            raise ValueError(f"stages on the same level must be equally wide, got widths {self.widths}")
        if self.early_mask_block is not None and not 0 <= self.early_mask_block < self.depths[0]:
            raise ValueError(f"early_mask_block {self.early_mask_block} is not a block of stage 0 (depth {self.depths[0]})")

    @property
    def stages(self) -> tuple[Stage, ...]:
        top = self.input_size // self.patch_size
        grids = (top, top // 2, top // 4, top // 2, top)
        rows = zip(self.depths, self.widths, self.num_heads, grids, strict=True)
        return tuple(Stage(depth=d, width=w, num_heads=h, grid=g) for d, w, h, g in rows)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def amm_blocks(self) -> range:
        """Where AMM can be: every block."""
        return range(sum(self.depths))

    @property
    def mask_places(self) -> tuple[MaskPlace, ...]:
        """Where the masked pass drops tokens, in order: (XL: inside stage 0,) then the two DownSamples."""
        first, second = self.stages[0].grid ** 2, self.stages[1].grid ** 2
        early = () if self.early_mask_block is None else (MaskPlace(first, 0.15, 0.25),)
        return (*early, MaskPlace(first, 0.4, 0.5), MaskPlace(second, 0.1, 0.2))


EDT_CONFIGS = {
    "EDT-S/2": EDTConfig(depths=(2, 2, 2, 3, 3), widths=(312, 416, 520, 416, 312), num_heads=(6, 8, 10, 8, 6)),
    "EDT-B/2": EDTConfig(depths=(2, 2, 2, 3, 3), widths=(624, 832, 1040, 832, 624), num_heads=(12, 16, 20, 16, 12)),
    # The depths of the released code. The paper's parameters and GMAC fit others, such as (6, 5, 4, 7, 6): pass depths=...;
    # loading a checkpoint infers them from its keys.
    "EDT-XL/2": EDTConfig(
        depths=(6, 4, 4, 7, 7), widths=(936, 1248, 1560, 1248, 936), num_heads=(18, 24, 30, 24, 18), early_mask_block=4
    ),
    # Ours, for one CPU and tiny images. A label table of standard deviation 0.02 is hardly learnt in the demo's short training.
    "EDT-Ti/2": EDTConfig(
        depths=(1, 1, 2, 1, 1),
        widths=(64, 96, 128, 96, 64),
        num_heads=(2, 3, 4, 3, 2),
        input_size=16,
        in_channels=3,
        num_classes=10,
        label_std=1.0,
    ),
}


def is_edt_state(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has EDT's groups of keys."""
    return {"down_blocks.0.reduction.weight", "up_blocks.0.expand.weight", "concat_blocks.0.cat.weight"} <= state.keys()


def config_from_state(state: dict[str, Tensor]) -> EDTConfig:
    """Infer an EDT's config from the keys and shapes of its state dict: also the depths, which differ between published files.

    early_mask_block is the registered model's of these widths. Raises ValueError for missing keys, and where neighbouring
    stages are equally wide: the keys do not tell them apart.
    """
    sizes = sizes_from_state(state)
    del sizes["width"]
    runs: list[list[int]] = []  # [width, heads, depth] of each stage
    while (key := f"blocks.{sum(run[2] for run in runs)}.attn") + ".qkv.weight" in state:
        table = state.get(key + ".rel_pos_bias.relative_position_bias_table")
        if table is None:
            raise ValueError(f"its weights lack the table of {key}.rel_pos_bias, which tells the number of heads")
        width, heads = state[key + ".qkv.weight"].shape[1], table.shape[1]
        if runs and runs[-1][0] == width:
            runs[-1][2] += 1
        else:
            runs.append([width, heads, 1])
    if len(runs) != NUM_STAGES:
        raise ValueError(f"the blocks have {len(runs)} different widths in a row, an EDT has {NUM_STAGES} stages")
    widths, num_heads, depths = zip(*runs, strict=True)
    return EDTConfig(
        depths=depths, widths=widths, num_heads=num_heads, early_mask_block=_early_mask_block(widths, depths[0]), **sizes
    )


def _early_mask_block(widths: tuple[int, ...], depth: int) -> int | None:
    """How a model is trained its weights do not say: as the registered one of these widths, if stage 0 has that block."""
    known = next((config.early_mask_block for config in EDT_CONFIGS.values() if config.widths == widths), None)
    return known if known is not None and known < depth else None


class DownSample(nn.Module):
    """Merge 2x2 neighbours: (B, N, D) -> (B, N/4, D_out)."""

    def __init__(self, below: Stage, above: Stage, cond_width: int):
        super().__init__()
        self.grid = above.grid
        self.adaLN_modulation = AdaLN(cond_width, 4 * above.width, 2)
        self.reduction = nn.Linear(4 * above.width, below.width, bias=False)
        self.pos_embed = fixed_table(below.width, below.grid)

    def _merge(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, N/4, 4, ...), the neighbours in the (row, column) order (0,0), (1,0), (0,1), (1,1)."""
        n = self.grid // 2
        x = x.unflatten(1, (n, 2, n, 2))  # (B, row, row offset, column, column offset, ...)
        return x.transpose(2, 3).transpose(3, 4).flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor, c: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, N) bool: False drops a token of the grid before merging: its quarter is zeroed before the reduction."""
        shift, scale = self.adaLN_modulation(c)
        x = modulate(normalize(self._merge(x).flatten(2)), shift, scale)  # (B, N/4, 4D)
        if keep is not None:
            x = (x.unflatten(2, (4, -1)) * self._merge(keep)[..., None]).flatten(2)
        return self.reduction(x) + self.pos_embed


class UpSample(nn.Module):
    """Split every token into 2x2: (B, N, D) -> (B, 4N, D_out)."""

    def __init__(self, below: Stage, above: Stage):
        super().__init__()
        self.grid = below.grid
        self.expand = nn.Linear(below.width, 4 * above.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.grid
        x = self.expand(x).view(x.shape[0], n, n, 2, 2, -1)  # (B, row, column, row offset, column offset, D_out)
        return x.transpose(2, 3).reshape(x.shape[0], 4 * n * n, -1)


class ConcatLayer(nn.Module):
    """Join a skip connection: x and skip (B, N, D) -> (B, N, D)."""

    def __init__(self, stage: Stage, cond_width: int):
        super().__init__()
        self.adaLN_modulation = AdaLN(cond_width, 2 * stage.width, 2)
        self.cat = nn.Linear(2 * stage.width, stage.width)
        self.pos_embed = fixed_table(stage.width, stage.grid)

    def forward(self, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.cat(modulate(normalize(torch.cat([x, skip], dim=2)), shift, scale)) + self.pos_embed


class EDT(GuidedNetwork):
    """See :meth:`forward`. amm: the blocks whose attention is modulated in eval mode, or None."""

    def __init__(self, config: EDTConfig, amm: AMM | None = None):
        super().__init__()
        self.config = config
        stages = config.stages
        if amm:
            amm.check(config.amm_blocks)
        width = stages[0].width  # of the conditioning as well
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = fixed_table(width, stages[0].grid)
        self.blocks = nn.ModuleList()
        for stage in stages:
            for _ in range(stage.depth):
                bias, form = RelativePositionBias(stage.grid, stage.num_heads), form_at(amm, len(self.blocks))
                attention = Attention(stage.width, stage.num_heads, stage.grid, position_bias=bias, amm=form)
                self.blocks.append(Block(stage.width, width, attention, config.mlp_ratio))
        self.down_blocks = nn.ModuleList(DownSample(stages[i + 1], stages[i], width) for i in (0, 1))
        self.up_blocks = nn.ModuleList(UpSample(stages[i - 1], stages[i]) for i in (3, 4))
        self.concat_blocks = nn.ModuleList(ConcatLayer(stages[i], width) for i in (3, 4))
        self.final_layer = FinalLayer(width, width, config.patch_size, config.out_channels)
        init_weights(self, config.label_std)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """Predict noise and variance.

        x: (B, C, S, S) noisy latents. t: (B,) timesteps in [0, 1000). y: (B,) labels, num_classes for "none".
        kept: None, or for a masked pass of the last M samples one bool (M, num_tokens) for each of ``config.mask_places``,
        False = dropped; the samples before them go unmasked. Returns (B, C_out, S, S). Raises ValueError for inputs or masks
        of another size than the model's.
        """
        config = self.config
        check_latents(x, config)
        early_keep, *down_keeps = self._split_masks(kept, len(x))
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        blocks, skips = iter(self.blocks), []
        for i, stage in enumerate(config.stages):
            if i < 2:
                skips.append(x)
            elif i > 2:
                x = self.concat_blocks[i - 3](self.up_blocks[i - 3](x), skips.pop(), c)
            for j in range(stage.depth):
                if early_keep is not None and i == 0 and j == config.early_mask_block:
                    x = torch.where(early_keep[..., None], x, self.pos_embed)
                block = next(blocks)
                x = block(x, c, block.attn.score_bias())
            if i < 2:
                x = self.down_blocks[i](x, c, down_keeps[i])
        return self.final_layer(x, c)

    def _split_masks(self, kept: Sequence[Tensor] | None, batch: int) -> Sequence[Tensor | None]:
        """-> (early, first DownSample, second DownSample) for the whole batch, None where nothing is dropped."""
        if kept is None:
            return None, None, None
        masked = len(kept[0]) if kept else 0
        expected = [(masked, place.num_tokens) for place in self.config.mask_places]
        shapes = [tuple(mask.shape) for mask in kept]
        if shapes != expected or masked > batch:
            raise ValueError(f"for {masked} of {batch} samples this model takes keep masks of shapes {expected}, got {shapes}")
        whole = [torch.cat([mask.new_ones(batch - masked, mask.shape[1]), mask]) for mask in kept]
        return whole if len(whole) == 3 else (None, *whole)
