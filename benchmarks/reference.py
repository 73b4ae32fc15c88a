"""Plain formulations that the networks' fast paths are measured against, with the same weights and the same results."""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.amm import amm_matrix
from models.attention import Attention
from models.mediators import MediatorAttention


def with_plain_attention(model: nn.Module) -> nn.Module:
    """A copy of a network whose attention is written out: see :class:`PlainAttention` and :class:`PlainMediatorAttention`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for fast, plain in ((Attention, PlainAttention), (MediatorAttention, PlainMediatorAttention)):
            if isinstance(module, fast):
                module.__class__ = plain
    return model


class PlainAttention(Attention):
    """Scores and probabilities of size (B, H, N, N) are stored, and the position bias is gathered from its table at each
    call."""

    def score_bias(self) -> None:
        """Nothing is prepared outside :meth:`forward`, but what is among some of the tokens only: ``score_bias_among``."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`Attention.forward`."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D/H)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, H, N, N)
        if bias is None and hasattr(self, "rel_pos_bias"):
            bias = self.rel_pos_bias()
        if bias is not None:
            scores = scores + bias
        probabilities = scores.softmax(dim=-1)
        if self.amm_is_active:
            probabilities = probabilities * _modulation(math.isqrt(N), self.amm, probabilities.device)
        return self.proj((probabilities.to(v.dtype) @ v).transpose(1, 2).reshape(B, N, D))


@functools.cache
def _modulation(grid: int, form: str, device: torch.device) -> Tensor:
    return amm_matrix(grid, form).to(device)


class PlainMediatorAttention(MediatorAttention):
    """As published: the position biases are resized, added up and repeated over the batch at each call; q, k and v are copied
    apart; scores and probabilities are stored; the convolution gets a copy of v as images, (B, D, n, n)."""

    def score_bias(self) -> None:
        """Nothing is prepared outside :meth:`forward`."""

    def forward(self, x: Tensor, bias: None) -> Tensor:
        """As :meth:`MediatorAttention.forward`."""
        B, N, D = x.shape
        split = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (tensor.contiguous() for tensor in split)  # each (B, H, N, D/H)
        pooled = F.adaptive_avg_pool2d(self._as_images(q), self.mediator_side)  # (B, D, sqrt(M), sqrt(M))
        mediators = pooled.view(B, self.num_heads, D // self.num_heads, -1).transpose(2, 3)  # (B, H, M, D/H)
        gather_bias, read_bias = (term.repeat(B, 1, 1, 1) for term in self._position_biases())
        scale = q.shape[-1] ** -0.5
        values = (scale * mediators @ k.transpose(-2, -1) + gather_bias).softmax(dim=-1) @ v  # (B, H, M, D/H)
        out = (scale * q @ mediators.transpose(-2, -1) + read_bias).softmax(dim=-1) @ values  # (B, H, N, D/H)
        local = self.dwc(self._as_images(v)).flatten(2).transpose(1, 2)  # (B, N, D)
        return self.proj(out.transpose(1, 2).reshape(B, N, D) + local)

    def _as_images(self, x: Tensor) -> Tensor:
        """(B, H, N, D/H) -> (B, D, n, n), contiguous."""
        return x.transpose(2, 3).reshape(len(x), -1, self.grid, self.grid)

    def _position_biases(self) -> tuple[Tensor, Tensor]:
        """(1, H, M, N) and (1, H, N, M)."""
        H, M, n = self.num_heads, self.mediator_side**2, self.grid
        an, na = (
            F.interpolate(table, size=(n, n), mode="bilinear", align_corners=False).reshape(1, H, M, n * n)
            for table in (self.an_bias, self.na_bias)
        )
        along_axes = (self.ah_bias + self.aw_bias).reshape(1, H, M, n * n)
        return an + along_axes, na.transpose(2, 3) + (self.ha_bias + self.wa_bias).reshape(1, H, n * n, M)
