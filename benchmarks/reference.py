"""The networks in their plain formulations: what the fast paths are measured against and, in tests, checked with.

:func:`plain_network` computes from a network's weights alone, by the names that they have in a state dict: every tensor that
the papers' formulas name is stored, position biases are gathered or resized at each call, softmax is written out. Only the
attention is plain in :func:`with_plain_attention`.
"""

import copy
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.amm import amm_matrix
from models.attention import Attention
from models.edt import EDTConfig
from models.mdt import MDTConfig
from models.mediators import MediatorAttention

# Attention


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, modulation: Tensor | None = None) -> Tensor:
    """q, k, v (B, H, N, D/H) -> (B, N, D). Scores and probabilities of size (B, H, N, N) are stored. modulation: AMM's M."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1)
    if modulation is not None:
        probabilities = probabilities * modulation
    return (probabilities.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, 3D) -> q, k, v, each (B, H, N, D/H)."""
    return qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def gathered_bias(table: Tensor, grid: int) -> Tensor:
    """The relative position bias (H, N, N) from its table ((2n-1)^2 or more, H)."""
    return table[_table_rows(grid, table.device)].permute(2, 0, 1)


@functools.cache
@torch.inference_mode(False)  # autograd takes no tensors that were first made in inference mode
def _table_rows(grid: int, device: torch.device) -> Tensor:
    """(N, N): for each query and key (dr + n-1) (2n-1) + (dc + n-1), with dr, dc their distance in rows and columns."""
    row, column = (places.flatten() for places in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    rows = (row[:, None] - row[None] + grid - 1) * (2 * grid - 1) + column[:, None] - column[None] + grid - 1
    return rows.to(device)


@functools.cache
@torch.inference_mode(False)
def _modulation(grid: int, form: str, device: torch.device) -> Tensor:
    return amm_matrix(grid, form).to(device)


def plain_mediators(qkv: Tensor, num_heads: int, tables: dict[str, Tensor], dwc: tuple[Tensor, Tensor]) -> Tensor:
    """Attention through mediators as published, (B, N, 3D) -> (B, N, D): the position biases are resized, added up and repeated
    over the batch at each call; q, k and v are copied apart; scores and probabilities are stored; the convolution gets a copy
    of v as images, (B, D, n, n). tables: an_bias and its like. dwc: weight and bias."""
    B, N, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (tensor.contiguous() for tensor in split_heads(qkv, num_heads))
    grid, mediator_num = math.isqrt(N), tables["an_bias"].shape[1]
    pooled = F.adaptive_avg_pool2d(_as_images(q, grid), math.isqrt(mediator_num))  # (B, D, sqrt(M), sqrt(M))
    mediators = pooled.view(B, num_heads, D // num_heads, mediator_num).transpose(2, 3)  # (B, H, M, D/H)
    gather_bias, read_bias = (term.repeat(B, 1, 1, 1) for term in _mediator_biases(tables, grid))
    scale = q.shape[-1] ** -0.5
    values = (scale * mediators @ k.transpose(-2, -1) + gather_bias).softmax(dim=-1) @ v  # (B, H, M, D/H)
    out = (scale * q @ mediators.transpose(-2, -1) + read_bias).softmax(dim=-1) @ values  # (B, H, N, D/H)
    local = F.conv2d(_as_images(v, grid), *dwc, padding=1, groups=D).flatten(2).transpose(1, 2)  # (B, N, D)
    return out.transpose(1, 2).flatten(2) + local


def _as_images(x: Tensor, grid: int) -> Tensor:
    """(B, H, N, D/H) -> (B, D, n, n), contiguous."""
    return x.transpose(2, 3).reshape(len(x), -1, grid, grid)


def _mediator_biases(tables: dict[str, Tensor], grid: int) -> tuple[Tensor, Tensor]:
    """(1, H, M, N) and (1, H, N, M)."""
    H, M = tables["an_bias"].shape[:2]
    an, na = (
        F.interpolate(tables[name], size=(grid, grid), mode="bilinear", align_corners=False).reshape(1, H, M, grid * grid)
        for name in ("an_bias", "na_bias")
    )
    along_axes = (tables["ah_bias"] + tables["aw_bias"]).reshape(1, H, M, grid * grid)
    return an + along_axes, na.transpose(2, 3) + (tables["ha_bias"] + tables["wa_bias"]).reshape(1, H, grid * grid, M)


# A network whose attention alone is plain


def with_plain_attention(model: nn.Module) -> nn.Module:
    """A copy of a network whose attention is written out: see :class:`PlainAttention` and :class:`PlainMediatorAttention`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for fast, plain in ((Attention, PlainAttention), (MediatorAttention, PlainMediatorAttention)):
            if isinstance(module, fast):
                module.__class__ = plain
    return model


class PlainAttention(Attention):
    def score_bias(self) -> None:
        """Nothing is prepared outside :meth:`forward`, but what is among some of the tokens only: ``score_bias_among``."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`Attention.forward`, by :func:`plain_attention`."""
        grid = math.isqrt(x.shape[1])
        if bias is None and hasattr(self, "rel_pos_bias"):
            bias = gathered_bias(self.rel_pos_bias.relative_position_bias_table, grid)
        modulation = _modulation(grid, self.amm, x.device) if self.amm_is_active else None
        return self.proj(plain_attention(*split_heads(self.qkv(x), self.num_heads), bias, modulation))


class PlainMediatorAttention(MediatorAttention):
    def score_bias(self) -> None:
        """Nothing is prepared outside :meth:`forward`."""

    def forward(self, x: Tensor, bias: None) -> Tensor:
        """As :meth:`MediatorAttention.forward`, by :func:`plain_mediators`."""
        tables = {name: table for name, table in self.named_parameters(recurse=False) if name.endswith("_bias")}
        return self.proj(plain_mediators(self.qkv(x), self.num_heads, tables, (self.dwc.weight, self.dwc.bias)))


# Whole networks


def plain_network(model: nn.Module) -> "PlainNetwork":
    """A plain EDT, DiT, MDTv2 or SiT with copies of a network's weights. AMM is taken over too."""
    if isinstance(model.config, EDTConfig):
        return PlainEDT(model)
    return PlainMDT(model) if isinstance(model.config, MDTConfig) else PlainDiT(model)


class PlainNetwork(nn.Module):
    """What the plain networks share. ``holder`` only holds the weights, which are read by name, and is never called.

    Where there is a masked pass, a call with ``kept`` is masked for every sample: the two passes are two calls.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.holder = copy.deepcopy(model)
        self.config = model.config
        self.weights = dict(self.holder.named_parameters())

    def modulation(self, attention: str, grid: int) -> Tensor | None:
        """AMM's M for the attention of that name; off in training."""
        form = getattr(self.holder.get_submodule(attention), "amm", None)
        return _modulation(grid, form, self.weights[f"{attention}.qkv.weight"].device) if form and not self.training else None

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def adaln(self, name: str, c: Tensor, chunks: int) -> tuple[Tensor, ...]:
        """Each (B, 1, ...)."""
        return self.linear(f"{name}.adaLN_modulation.1", F.silu(c)).unsqueeze(1).chunk(chunks, dim=2)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies[None]
        embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        embedding = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", embedding)))
        return embedding + self.weights["y_embedder.embedding_table.weight"][y]

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N, D)."""
        weight, bias = self.weights["x_embedder.proj.weight"], self.weights["x_embedder.proj.bias"]
        return F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + self.weights["pos_embed"]

    def attention(self, name: str, x: Tensor, num_heads: int, tokens: Tensor | None = None) -> Tensor:
        """tokens (B, K): which of the grid's tokens x holds; None: all."""
        qkv = self.linear(f"{name}.qkv", x)
        if f"{name}.an_bias" in self.weights:
            tables = {f"{part}_bias": self.weights[f"{name}.{part}_bias"] for part in ("an", "na", "ah", "aw", "ha", "wa")}
            dwc = self.weights[f"{name}.dwc.weight"], self.weights[f"{name}.dwc.bias"]
            return self.linear(f"{name}.proj", plain_mediators(qkv, num_heads, tables, dwc))
        grid = math.isqrt(x.shape[1]) if tokens is None else self.config.grid
        table, bias = self.weights.get(f"{name}.rel_pos_bias.relative_position_bias_table"), None
        if table is not None:
            bias = gathered_bias(table, grid)
            if tokens is not None:
                bias = bias[:, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1)  # (B, H, K, K)
        out = plain_attention(*split_heads(qkv, num_heads), bias, self.modulation(name, grid))
        return self.linear(f"{name}.proj", out)

    def block(self, name: str, x: Tensor, c: Tensor, num_heads: int, tokens: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(name, c, 6)
        x = x + gate_a * self.attention(f"{name}.attn", modulated(x, shift_a, scale_a), num_heads, tokens)
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", modulated(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m * self.linear(f"{name}.mlp.fc2", hidden)

    def output(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) -> (B, C_out, S, S)."""
        x = self.linear("final_layer.linear", modulated(x, *self.adaln("final_layer", c, 2)))
        n, p = math.isqrt(x.shape[1]), self.config.patch_size
        x = torch.einsum("bhwpqc->bchpwq", x.reshape(len(x), n, n, p, p, -1))
        return x.reshape(len(x), -1, n * p, n * p)[:, : self.config.out_channels]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine weights, then x * (1 + scale) + shift; shift and scale (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PlainDiT(PlainNetwork):
    """DiT, and SiT with or without mediators."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, x = self.condition(t, y), self.patches(x)
        for i in range(self.config.depth):
            x = self.block(f"blocks.{i}", x, c, self.config.num_heads)
        return self.output(x, c)


class PlainEDT(PlainNetwork):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """kept: one bool (B, num_tokens) for each of ``config.mask_places``."""
        c, x = self.condition(t, y), self.patches(x)
        early, *drops = [None, None, None] if kept is None else [None] * (3 - len(kept)) + list(kept)
        skips, k = [], 0
        for i, stage in enumerate(self.config.stages):
            if i < 2:
                skips.append(x)
            elif i > 2:
                x = self.join(i - 3, self.up(i - 3, x), skips.pop(), c)
            for j in range(stage.depth):
                if early is not None and i == 0 and j == self.config.early_mask_block:
                    x = torch.where(early[..., None], x, self.weights["pos_embed"])
                x, k = self.block(f"blocks.{k}", x, c, stage.num_heads), k + 1
            if i < 2:
                x = self.down(i, x, c, drops[i])
        return self.output(x, c)

    def down(self, i: int, x: Tensor, c: Tensor, keep: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N/4, D_out): the neighbours (0,0), (1,0), (0,1), (1,1) are joined."""
        name, n = f"down_blocks.{i}", math.isqrt(x.shape[1])

        def joined(values: Tensor) -> Tensor:
            grid = values.unflatten(1, (n, n))
            return torch.cat([grid[:, r::2, s::2] for s in (0, 1) for r in (0, 1)], dim=-1).flatten(1, 2)

        out = modulated(joined(x), *self.adaln(name, c, 2))
        if keep is not None:
            out = out * joined(keep[..., None].expand_as(x))
        return self.linear(f"{name}.reduction", out) + self.weights[f"{name}.pos_embed"]

    def up(self, i: int, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 4N, D_out)."""
        n = math.isqrt(x.shape[1])
        x = self.linear(f"up_blocks.{i}.expand", x).reshape(len(x), n, n, 2, 2, -1)
        return torch.einsum("bhwpqc->bhpwqc", x).reshape(len(x), 4 * n * n, -1)

    def join(self, i: int, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        name = f"concat_blocks.{i}"
        joined = modulated(torch.cat([x, skip], dim=-1), *self.adaln(name, c, 2))
        return self.linear(f"{name}.cat", joined) + self.weights[f"{name}.pos_embed"]


class PlainMDT(PlainNetwork):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """kept: the one tensor (B, K) int64 of ``config.mask_places``, the tokens that the encoder sees."""
        c, patches, tokens = self.condition(t, y), self.patches(x), None if kept is None else kept[0]
        x = patches
        if tokens is not None:
            x = patches.gather(1, tokens[..., None].expand(-1, -1, patches.shape[2]))
        skips, half = [], self.config.encoder_depth
        for i in range(half):
            x = self.block(f"en_inblocks.{i}", x, c, self.config.num_heads, tokens)
            skips.append(x)
        for i in range(half):
            x = self.joined_block(f"en_outblocks.{i}", x, skips.pop(), c, tokens)
        x = x + self.weights["decoder_pos_embed"] if tokens is None else self.filled(x, tokens, c)
        for i in range(self.config.depth - 2 * half):
            x = self.joined_block(f"de_blocks.{i}", x, patches, c)
        return self.output(x, c)

    def joined_block(self, name: str, x: Tensor, skip: Tensor, c: Tensor, tokens: Tensor | None = None) -> Tensor:
        x = self.linear(f"{name}.skip_linear", torch.cat([x, skip], dim=-1))
        return self.block(name, x, c, self.config.num_heads, tokens)

    def filled(self, x: Tensor, tokens: Tensor, c: Tensor) -> Tensor:
        """The kept tokens (B, K, D) -> (B, N, D): the side block predicts the others from the mask token."""
        places = tokens[..., None].expand_as(x)
        number = self.config.grid**2
        is_kept = torch.zeros(len(x), number, 1, device=x.device).scatter(1, tokens[..., None], 1.0)
        blank = self.weights["mask_token"].to(x.dtype).expand(len(x), number, -1)
        x = blank.scatter(1, places, x) + self.weights["decoder_pos_embed"]
        return x * is_kept + self.block("sideblocks.0", x, c, self.config.num_heads) * (1 - is_kept)
