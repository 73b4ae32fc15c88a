"""MDTv2, a masked diffusion transformer (Gao et al. 2023, "MDTv2: Masked Diffusion Transformer is a Strong Image
Synthesizer").

Encoder-in blocks, as many encoder-out blocks with skip connections from them, and decoder blocks, each with the embedded
patches as its skip. In training a second pass runs the encoder on a part of the tokens; the side block fills in the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.amm import AMM, form_at
from models.attention import Attention, RelativePositionBias
from models.dit import SIZES, TINY, DiTConfig, count_blocks
from models.layers import (
    Block,
    FinalLayer,
    GuidedNetwork,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    check_latents,
    init_weights,
    sincos_table,
    sizes_from_state,
)

SPARE_ROWS = 3  # of the published position-bias tables
MASK_RATIO, MASK_RATIO_RANGE = 0.3, 0.2


class TokenSubset(NamedTuple):
    """The masked pass: every sample keeps the same number of tokens; the dropped share is ~ U(low, high) per pass."""

    num_tokens: int
    low: float
    high: float

    def kept(self, uniforms: Tensor, share: float) -> Tensor:
        """U(0, 1) draws (b, num_tokens) -> the kept tokens, int64 (b, K) ascending: the K = int(num_tokens (1 - share)) of the
        smallest draws."""
        number = int(self.num_tokens * (1 - share))
        return uniforms.argsort(dim=1, stable=True)[:, :number].sort(dim=1).values


@dataclass(frozen=True, kw_only=True)
class MDTConfig(DiTConfig):
    """As :class:`DiTConfig`; depth counts encoder and decoder."""

    decode_layer: int = 4  # decoder blocks; the rest is encoder, half in, half out. The published S run has 6

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decode_layer < self.depth or (self.depth - self.decode_layer) % 2:
            raise ValueError(
                f"decode_layer must leave an even number of the {self.depth} blocks to the encoder, got {self.decode_layer}"
            )

    @property
    def encoder_depth(self) -> int:
        """Of each half of the encoder."""
        return (self.depth - self.decode_layer) // 2

    @property
    def mask_places(self) -> tuple[TokenSubset, ...]:
        """Where the masked pass drops tokens: before the encoder."""
        return (TokenSubset(self.grid**2, MASK_RATIO, MASK_RATIO + MASK_RATIO_RANGE),)


MDT_CONFIGS = {
    f"MDTv2-{size}/2": MDTConfig(depth=depth, width=width, num_heads=num_heads)
    for size, (depth, width, num_heads) in SIZES.items()
}
MDT_CONFIGS["MDTv2-Ti/2"] = MDTConfig(**TINY, decode_layer=2)  # ours


def is_mdt_state(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has MDTv2's groups of keys."""
    return {"mask_token", "decoder_pos_embed", "de_blocks.0.skip_linear.weight"} <= state.keys()


def config_from_state(state: dict[str, Tensor]) -> MDTConfig:
    """Infer an MDTv2's config from the keys and shapes of its state dict. Raises ValueError for missing keys, and for another
    number of encoder-in than encoder-out blocks."""
    sizes = sizes_from_state(state, "en_inblocks.0")
    table = state.get("en_inblocks.0.attn.rel_pos_bias.relative_position_bias_table")
    if table is None or table.ndim != 2:
        raise ValueError("its weights lack the table of en_inblocks.0.attn.rel_pos_bias, which tells the number of heads")
    going_in, going_out, decoding = (count_blocks(state, group) for group in ("en_inblocks", "en_outblocks", "de_blocks"))
    if going_in != going_out:
        raise ValueError(f"an MDTv2 has as many encoder-in as encoder-out blocks, here they are {going_in} and {going_out}")
    return MDTConfig(depth=going_in + going_out + decoding, decode_layer=decoding, num_heads=table.shape[1], **sizes)


class SkipBlock(Block):
    """A :class:`Block` whose input x is joined with a skip connection: Linear([x, skip])."""

    def __init__(self, width: int, cond_width: int, attention: Attention, mlp_ratio: float):
        super().__init__(width, cond_width, attention, mlp_ratio)
        self.skip_linear = nn.Linear(2 * width, width)

    def compute(self, x: Tensor, c: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        return super().compute(self.skip_linear(torch.cat([x, skip], dim=2)), c, bias)


class MDT(GuidedNetwork):
    """See :meth:`forward`. amm: the blocks whose attention is modulated in eval mode, counted through encoder-in, encoder-out
    and decoder, or None.

    cfg_power: how late guidance sets in as published, see :meth:`guidance_scale`; samplers take it where no other is asked for.
    """

    tokens_vary = True  # the masked pass keeps another number at each step
    cfg_power = 4.0

    def __init__(self, config: MDTConfig, amm: AMM | None = None):
        super().__init__()
        self.config = config
        if amm:
            amm.check(config.amm_blocks)
        width, half = config.width, config.encoder_depth
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = nn.Parameter(sincos_table(width, config.grid))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, config.grid))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        forms = [form_at(amm, i) for i in range(config.depth)]
        self.en_inblocks = nn.ModuleList(self._block(form) for form in forms[:half])
        self.en_outblocks = nn.ModuleList(self._block(form, SkipBlock) for form in forms[half : 2 * half])
        self.de_blocks = nn.ModuleList(self._block(form, SkipBlock) for form in forms[2 * half :])
        self.sideblocks = nn.ModuleList([self._block(None)])
        self.final_layer = FinalLayer(width, width, config.patch_size, config.computed_channels)
        init_weights(self, config.label_std)
        nn.init.normal_(self.mask_token, std=0.02)

    def _block(self, form: str | None, kind: type[Block] = Block) -> Block:
        config = self.config
        bias = RelativePositionBias(config.grid, config.num_heads, spare_rows=SPARE_ROWS, keep_index=True)
        attention = Attention(config.width, config.num_heads, config.grid, position_bias=bias, amm=form)
        return kind(config.width, config.width, attention, config.mlp_ratio)

    @property
    def blocks(self) -> list[Block]:
        """In the order of AMM's indices; the side block is none of them."""
        return [*self.en_inblocks, *self.en_outblocks, *self.de_blocks]

    def without_masked_pass(self) -> "MDT":
        """Leave what only the masked pass uses out of training."""
        self.mask_token.requires_grad_(False)
        self.sideblocks.requires_grad_(False)
        return self

    def guidance_scale(self, cfg_scale: float, t: Tensor) -> Tensor:
        """1 + (s - 1) (1 - cos(pi (1 - t/1000)^power)) / 2: from no guidance at t = 1000 to all of it at 0 (the power-cosine
        schedule of MDTv2). cfg_power 0 gives s at all times, as do the times in [0, 1] of a transport."""
        growth = (1 - torch.cos(math.pi * (1 - t.float() / 1000) ** self.cfg_power)) / 2
        return (1 + (cfg_scale - 1) * growth).view(-1, 1, 1, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """Predict noise and variance.

        x: (B, C, S, S) noisy latents. t: (B,) timesteps in [0, 1000). y: (B,) labels, num_classes for "none". kept: None, or
        for a masked pass of the last M samples the one tensor (M, K) int64 of ``config.mask_places``: the tokens that the
        encoder sees; the samples before them go unmasked. Returns (B, C_out, S, S). Raises ValueError for inputs of another
        size than the model's, and for a masked pass with active AMM.
        """
        check_latents(x, self.config)
        c = self.t_embedder(t) + self.y_embedder(y)
        patches = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        if kept is None:
            x = self._encode(patches, c, None) + self.decoder_pos_embed
        else:
            self._check_kept(kept, len(x))
            x = self._encode_both(patches, c, *kept)
        for block in self.de_blocks:
            x = block(x, c, block.attn.score_bias(), patches)
        return self.final_layer(x, c)

    def _check_kept(self, kept: Sequence[Tensor], batch: int) -> None:
        if len(kept) != 1:
            raise ValueError(f"the masked pass takes one tensor of kept tokens, got {len(kept)}")
        [tokens], number = kept, self.config.grid**2
        small = tokens.ndim == 2 and len(tokens) <= batch and 0 < tokens.shape[1] <= number
        if tokens.dtype != torch.int64 or not small:
            raise ValueError(
                f"for {batch} samples of {number} tokens the masked pass takes those that are kept, int64 (M, K), of at most "
                f"so many samples and tokens, got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if any(block.attn.amm_is_active for block in self.blocks):
            raise ValueError("AMM is active: a masked pass is of training, use train mode or a model without AMM")

    def _encode(self, x: Tensor, c: Tensor, tokens: Tensor | None) -> Tensor:
        """x: (B, N, D), or only the tokens (B, K), as (B, K, D)."""
        table = self.en_inblocks[0].attn.rel_pos_bias
        pairs = None if tokens is None else table.pairs(tokens)

        def bias(attention: Attention) -> Tensor:
            return attention.score_bias() if pairs is None else attention.score_bias_among(pairs)

        skips = []
        for block in self.en_inblocks:
            x = block(x, c, bias(block.attn))
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, bias(block.attn), skips.pop())
        return x

    def _encode_both(self, patches: Tensor, c: Tensor, tokens: Tensor) -> Tensor:
        """The decoder's input (B, N, D): the last M samples' tokens (M, K) are encoded by themselves, and the side block
        predicts the others from them."""
        whole = len(patches) - len(tokens)
        places = tokens[..., None].expand(-1, -1, patches.shape[2])  # (M, K, D)
        seen = self._encode(patches[whole:].gather(1, places), c[whole:], tokens)
        filled = self.mask_token.to(seen.dtype).expand(*patches[whole:].shape).scatter(1, places, seen)
        filled = filled + self.decoder_pos_embed
        [side] = self.sideblocks
        predicted = side(filled, c[whole:], side.attn.score_bias())
        is_kept = torch.zeros(tokens.shape[0], patches.shape[1], 1, dtype=torch.bool, device=tokens.device)
        is_kept.scatter_(1, tokens[..., None], True)
        masked = torch.where(is_kept, filled, predicted)
        if not whole:
            return masked
        return torch.cat([self._encode(patches[:whole], c[:whole], None) + self.decoder_pos_embed, masked])
