"""Attention through mediator tokens: O(N M D) instead of O(N^2 D) (Pu et al. 2024, "Efficient Diffusion Transformer with
Step-wise Dynamic Attention Mediators")."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import BiasedAttention, attend

TABLE_SIDE = 7  # of the learned tables an_bias and na_bias, which are resized to the grid


def mediator_side(mediator_num: int, grid: int) -> int:
    """sqrt(mediator_num). Raises ValueError unless it is a whole number from 1 to grid."""
    side = math.isqrt(max(mediator_num, 0))
    if side**2 != mediator_num or not 1 <= side <= grid:
        nearest = sorted({min(max(s, 1), grid) ** 2 for s in (side, side + 1)})
        raise ValueError(
            f"mediator_num must be a square number, at most {grid}^2 on a token grid of side {grid}, got {mediator_num}: "
            f"the nearest {'are' if len(nearest) > 1 else 'is'} {' and '.join(map(str, nearest))}"
        )
    return side


class MediatorAttention(BiasedAttention):
    """Self-attention over N = grid^2 tokens through M = mediator_num mediators.

    The mediators m are q, averaged on the grid down to sqrt(M) x sqrt(M). They gather V' = softmax(m k^T + bias_1) v, every
    token reads from them, softmax(q m^T + bias_2) V' (both scaled by head_dim^-0.5), and a depthwise 3x3 convolution of v is
    added. The score bias is the pair bias_1 (1, H, M, N), bias_2 (1, H, N, M); each is the sum of a 7 x 7 table resized to the
    grid, one term for each row and one for each column.

    Raises ValueError for an M that is no square number or exceeds the grid.
    """

    def __init__(self, width: int, num_heads: int, grid: int, mediator_num: int):
        super().__init__(width, num_heads)
        self.grid, self.mediator_side = grid, mediator_side(mediator_num, grid)
        H, M = num_heads, mediator_num
        # a: mediators, n: tokens; h: height, that is the row; w: width, the column
        self.an_bias = nn.Parameter(torch.empty(H, M, TABLE_SIDE, TABLE_SIDE))
        self.na_bias = nn.Parameter(torch.empty(H, M, TABLE_SIDE, TABLE_SIDE))
        self.ah_bias = nn.Parameter(torch.empty(1, H, M, grid, 1))
        self.aw_bias = nn.Parameter(torch.empty(1, H, M, 1, grid))
        self.ha_bias = nn.Parameter(torch.empty(1, H, grid, 1, M))
        self.wa_bias = nn.Parameter(torch.empty(1, H, 1, grid, M))
        for table in self._bias_tables():
            nn.init.trunc_normal_(table, std=0.02)
        # Laid out as the gradient comes, from channels-last images: DDP's buckets want the two alike.
        self.dwc = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width).to(memory_format=torch.channels_last)

    def _bias_tables(self) -> tuple[Tensor, ...]:
        return self.an_bias, self.na_bias, self.ah_bias, self.aw_bias, self.ha_bias, self.wa_bias

    def _expand_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gather = self._resized(self.an_bias) + (self.ah_bias + self.aw_bias).flatten(3)  # (1, H, M, N)
        read = self._resized(self.na_bias).transpose(2, 3) + (self.ha_bias + self.wa_bias).flatten(2, 3)  # (1, H, N, M)
        return gather.to(dtype).contiguous(), read.to(dtype).contiguous()

    def _resized(self, table: Tensor) -> Tensor:
        """(H, M, 7, 7) -> (1, H, M, N)."""
        size = (self.grid, self.grid)
        return F.interpolate(table, size, mode="bilinear", align_corners=False).flatten(2)[None]

    def forward(self, x: Tensor, bias: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, D) -> (B, N, D). bias: what :meth:`score_bias` returned."""
        q, mediators, k, v, gather_bias, read_bias = self.operands(x, bias)
        values = attend(mediators, k, self._heads(v), gather_bias)  # (B, H, M, D/H)
        out = attend(q, mediators, values, read_bias).transpose(1, 2).flatten(2)
        return self.proj(_tokens(self.dwc(self._image(v))).add_(out))

    def operands(self, x: Tensor, bias: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of :meth:`forward`'s arguments: q (B, H, N, D/H), the mediators (B, H, M, D/H), k as q, v (B, N, D), and the expanded
        biases."""
        # Three products in place of one, so that v is dense: the convolution would copy a slice.
        q, k, v = (
            F.linear(x, w, b) for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        )  # (B, N, D)
        return self._heads(q), self._heads(self._pool(q)), self._heads(k), v, *self._expanded(bias)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _image(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D, n, n), a view that is channels-last in memory."""
        return x.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)

    def _pool(self, q: Tensor) -> Tensor:
        """(B, N, D) -> (B, M, D): the adaptive average pool."""
        side, window = self.mediator_side, self.grid // self.mediator_side
        if self.grid % side:
            return _tokens(F.adaptive_avg_pool2d(self._image(q), side))
        # Equal windows. One axis after the other: a mean over two axes at once is several times slower on a CPU.
        return q.unflatten(1, (side, window, side, window)).mean(4).mean(2).flatten(1, 2)


def _tokens(image: Tensor) -> Tensor:
    """(B, D, n, n) -> (B, N, D)."""
    return image.flatten(2).transpose(1, 2)
