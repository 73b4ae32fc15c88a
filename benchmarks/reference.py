"""Plain formulations that the networks' fast paths are measured against, with the same weights and the same results."""

import copy
import functools
import math

import torch
from torch import Tensor, nn

from models.amm import amm_matrix
from models.attention import Attention


def with_plain_attention(model: nn.Module) -> nn.Module:
    """A copy of a network whose attention is written out: see :class:`PlainAttention`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = PlainAttention
    return model


class PlainAttention(Attention):
    """Scores and probabilities of size (B, H, N, N) are stored, and the position bias is gathered from its table at each
    call."""

    def score_bias(self) -> None:
        """Nothing is prepared outside :meth:`forward`."""

    def forward(self, x: Tensor, bias: None) -> Tensor:
        """As :meth:`Attention.forward`."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D/H)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, H, N, N)
        if hasattr(self, "rel_pos_bias"):
            scores = scores + self.rel_pos_bias()
        probabilities = scores.softmax(dim=-1)
        if self.amm_is_active:
            probabilities = probabilities * _modulation(math.isqrt(N), self.amm, probabilities.device)
        return self.proj((probabilities.to(v.dtype) @ v).transpose(1, 2).reshape(B, N, D))


@functools.cache
def _modulation(grid: int, form: str, device: torch.device) -> Tensor:
    return amm_matrix(grid, form).to(device)
