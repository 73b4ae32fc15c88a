"""Multi-head self-attention: plain, with a relative position bias, and with AMM; :func:`attention_kernel` says through what."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.amm import MAXIMA, amm_matrix
from models.flex import flex_attention_with, flex_available
from models.softmax import softmax

WRITTEN_OUT_SCORES = 2**20  # of a head: more are not stored


class RelativePositionBias(nn.Module):
    """A learned score bias for every offset between two tokens of a grid (Liu et al. 2021, Swin Transformer, eq. 4).

    spare_rows: rows at the end of the table that no offset uses, as MDTv2's has. keep_index: the state dict holds the index.
    """

    def __init__(self, grid: int, num_heads: int, *, spare_rows: int = 0, keep_index: bool = False):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * grid - 1) ** 2 + spare_rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        row, column = row.flatten(), column.flatten()
        offset = (row[:, None] - row + grid - 1) * (2 * grid - 1) + (column[:, None] - column + grid - 1)
        self.register_buffer("relative_position_index", offset, persistent=keep_index)  # (N, N): [query, key]

    def forward(self) -> Tensor:
        """(H, N, N)."""
        return _columns(self.relative_position_bias_table.t(), self.relative_position_index)

    def pairs(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) int64 -> what :meth:`among` takes: each pair of them, (B, K, K), as query * N + key. The same for all
        attentions on one grid."""
        return tokens[:, :, None] * len(self.relative_position_index) + tokens[:, None, :]

    def among(self, pairs: Tensor) -> Tensor:
        """The bias among some tokens of each sample: (B, H, K, K)."""
        # By way of the whole bias: in the backward a GPU adds few numbers to each of many, not many to each row of the table.
        return _columns(self().flatten(1), pairs).transpose(0, 1)


def _columns(rows: Tensor, index: Tensor) -> Tensor:
    """rows (H, L), index of any shape -> (H, *index.shape). Several times faster than indexing, above all in the backward."""
    return rows.index_select(1, index.flatten()).unflatten(1, index.shape)


def _padded_head_dim(head_dim: int, device: torch.device) -> int:
    """CUDA's fused kernels take head dimensions that are multiples of 8 (EDT's is 52)."""
    return -(-head_dim // 8) * 8 if device.type == "cuda" else head_dim


def _working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a product with this weight is computed in."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def attention_kernel(q: Tensor, k: Tensor, bias: Tensor | None, amm: bool = False) -> str:
    """Through what :func:`attend`, or AMM, is computed fastest: "fused", PyTorch's own kernels; "written-out"; or "flex", a
    kernel compiled for the purpose.

    On a CPU (measured without AMX) the fused kernel is slower in bf16 than products and softmax one after the other, and it
    has no gradient for a bias.
    """
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= WRITTEN_OUT_SCORES:
        learns = bias is not None and bias.requires_grad
        return "written-out" if learns or q.dtype == torch.bfloat16 else "fused"
    modified = (amm or bias is not None) and q.shape[2] == k.shape[2]
    return "flex" if modified and flex_available(q, torch.is_grad_enabled()) else "fused"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v. q (B, H, N, head_dim), k and v (B, H, N_keys, head_dim); bias broadcasts to
    (B, H, N, N_keys)."""
    kernel = attention_kernel(q, k, bias)
    if kernel == "flex":
        return flex_attention_with(q, k, v, bias)
    return written_out_attention(q, k, v, bias) if kernel == "written-out" else fused_attention(q, k, v, bias)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: Tensor | None = None) -> Tensor:
    """:func:`attend`, with scores and probabilities in memory. factor (N, N_keys): multiplies the probabilities."""
    probabilities = attention_probabilities(q, k, bias)
    return (probabilities if factor is None else probabilities * factor) @ v


def attention_probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias), (B, H, N, N_keys); arguments as of :func:`attend`."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return softmax(scores if bias is None else scores.add_(bias))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`attend`, through PyTorch's fused kernels."""
    head_dim = q.shape[-1]
    padding = _padded_head_dim(head_dim, q.device) - head_dim
    if padding:
        q, k, v = (F.pad(tensor, (0, padding)) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=head_dim**-0.5)
    return out[..., :head_dim] if padding else out


class BiasedAttention(nn.Module):
    """What the attentions share: the linears, and a score bias that is expanded from learned tables.

    A subclass says which tables (:meth:`_bias_tables`) and what they expand to (:meth:`_expand_bias`).

    expands_inside: expand them in forward, which then alone reads the tables; :meth:`score_bias` gives what that needs.
    """

    expands_inside = False

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"the width {width} is not divisible by the number of heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self._cached_bias: Tensor | tuple[Tensor, ...] | None = None
        self._cache_key: tuple | None = None

    def score_bias(self) -> Tensor | tuple[Tensor, ...] | None:
        """What :meth:`forward` takes as ``bias``.

        Expanded at each call where a gradient may be wanted; otherwise once, and again whenever the tables' values, device or
        the working precision have changed.
        """
        if self.expands_inside:
            return None
        weight, tables = self.proj.weight, self._bias_tables()
        dtype = _working_dtype(weight)
        # A compiled graph without gradients has it among its constants.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(table.is_inference() for table in tables):
            return self._expand_bias(dtype)
        key = (weight.device, dtype, *((id(table), table.data_ptr(), table._version) for table in tables))
        if key != self._cache_key:
            self._cached_bias, self._cache_key = self._expand_bias(dtype), key
        return self._cached_bias

    def train(self, mode: bool = True) -> "BiasedAttention":
        """A change of mode drops the cache: writes through ``.data`` leave no trace."""
        self._cached_bias = self._cache_key = None
        return super().train(mode)

    def _expanded(self, bias: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
        """The bias from what the caller of forward was given for it."""
        return self._expand_bias(_working_dtype(self.proj.weight)) if self.expands_inside else bias

    def _bias_tables(self) -> tuple[Tensor, ...]:
        """The parameters that the bias depends on."""
        return ()

    def _expand_bias(self, dtype: torch.dtype) -> Tensor | tuple[Tensor, ...] | None:
        """The bias in the working precision, None for no bias."""
        return None


class Attention(BiasedAttention):
    """Self-attention over N = grid^2 tokens.

    position_bias: a learned :class:`RelativePositionBias` to add, or None. amm: None, "exp" or "cos"; in eval mode the
    attention probabilities are then multiplied by M = ``amm_matrix(grid, amm)`` without renormalising. The score bias is None
    or (1, H, N, N).

    AMM through a fused kernel: with c = max M, every key appears twice, once with score s + log M and its value v, once with
    score s + log(c - M) and value 0. The denominator is then c * sum(exp s) and the numerator sum(exp(s) M v), so c times the
    result is the wanted one; nothing of size (B, H, N, N) is stored.
    """

    def __init__(self, width: int, num_heads: int, grid: int, *, position_bias: RelativePositionBias | None, amm: str | None):
        super().__init__(width, num_heads)
        if position_bias is not None:
            self.rel_pos_bias = position_bias
        self.grid, self.amm = grid, amm
        if amm:
            matrix = amm_matrix(grid, amm, torch.float64)
            rest = (MAXIMA[amm] - matrix).clamp(min=0)  # the diagonal is 0, or its rounding
            logs = torch.cat([matrix.log(), rest.log()], dim=1).float()
            self.register_buffer("amm_matrix", matrix.float(), persistent=False)  # (N, N)
            self.register_buffer("amm_log", logs, persistent=False)  # (N, 2N)

    @property
    def amm_is_active(self) -> bool:
        return bool(self.amm) and not self.training

    def _bias_tables(self) -> tuple[Tensor, ...]:
        return (self.rel_pos_bias.relative_position_bias_table,) if hasattr(self, "rel_pos_bias") else ()

    def _expand_bias(self, dtype: torch.dtype) -> Tensor | None:
        return self.rel_pos_bias()[None].to(dtype) if hasattr(self, "rel_pos_bias") else None

    def score_bias_among(self, pairs: Tensor) -> Tensor:
        """:meth:`score_bias` where a sample has only some of the tokens, (B, H, K, K); pairs: see
        :meth:`RelativePositionBias.pairs`. Raises ValueError while AMM is active, which needs them all."""
        if self.amm_is_active:
            raise ValueError("AMM is active: it needs all tokens")
        return pairs if self.expands_inside else self._expand_among(pairs)

    def _expand_among(self, pairs: Tensor) -> Tensor:
        return self.rel_pos_bias.among(pairs).to(_working_dtype(self.proj.weight)).contiguous()

    def _expanded(self, bias: Tensor | None) -> Tensor | None:
        """As above; pairs stand for the bias among some tokens."""
        if self.expands_inside and bias is not None:
            return self._expand_among(bias)
        return super()._expanded(bias)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, N, D) -> (B, N, D). bias: what :meth:`score_bias` returned; it is an argument so that a compiled block
        contains neither the cache nor its test."""
        q, k, v, bias = self.operands(x, bias)
        out = self._modulated(q, k, v, bias) if self.amm_is_active else attend(q, k, v, bias)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def operands(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What :meth:`forward` computes attention from: q, k, v, each (B, H, N, D/H), and the expanded bias."""
        B, N, _ = x.shape
        parts = self.qkv(x).chunk(3, dim=2)
        q, k, v = (part.view(B, N, self.num_heads, -1).transpose(1, 2) for part in parts)
        return q, k, v, self._expanded(bias)

    def _modulated(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """:func:`attend` with AMM."""
        kernel = attention_kernel(q, k, bias, amm=True)
        if kernel == "flex":
            return flex_attention_with(q, k, v, bias, self.grid, self.amm)
        if kernel == "written-out":
            return written_out_attention(q, k, v, bias, self.amm_matrix.to(q.dtype))
        logs = self.amm_log[None, None]
        doubled_bias = logs if bias is None else torch.cat([bias, bias], dim=-1) + logs
        doubled = torch.cat([k, k], dim=2), torch.cat([v, torch.zeros_like(v)], dim=2)
        return MAXIMA[self.amm] * fused_attention(q, *doubled, doubled_bias.to(q.dtype))
