"""The attention maps of a network at work. Fused kernels store none: they are computed again from what a block is given."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention import BiasedAttention, attention_probabilities
from models.mediators import MediatorAttention


@dataclass(frozen=True)
class AttentionMap:
    """Of plain attention over N = grid^2 tokens.

    probabilities (B, H, N, N): a row is a query's, and sums to 1. modulation (N, N): AMM's matrix where it is active, or None.
    """

    grid: int
    probabilities: Tensor
    modulation: Tensor | None

    @property
    def applied(self) -> Tensor:
        """What the values are multiplied by, as probabilities: with AMM, which does not renormalise, no row sums to 1."""
        return self.probabilities if self.modulation is None else self.probabilities * self.modulation


@dataclass(frozen=True)
class MediatorMap:
    """Of attention over N = grid^2 tokens through M = mediator_side^2 mediators.

    gather (B, H, M, N): what each mediator takes from the tokens. read (B, H, N, M): what each token takes from the mediators.
    Rows sum to 1.
    """

    grid: int
    mediator_side: int
    gather: Tensor
    read: Tensor


def map_of(attention: BiasedAttention, x: Tensor, bias: Tensor | tuple[Tensor, ...] | None) -> AttentionMap | MediatorMap:
    """x and bias: what ``attention.forward`` is called with. Raises ValueError for an attention that does not say what it
    multiplies."""
    if not hasattr(attention, "operands"):
        raise ValueError(
            f"{type(attention).__name__} has no operands(x, bias) -> (q, k, v, bias), from which its map is drawn: write it, "
            "or choose other blocks"
        )
    if isinstance(attention, MediatorAttention):
        q, mediators, k, _, gather_bias, read_bias = attention.operands(x, bias)
        gather = attention_probabilities(mediators, k, gather_bias)
        read = attention_probabilities(q, mediators, read_bias)
        return MediatorMap(attention.grid, attention.mediator_side, gather, read)
    q, k, _, bias = attention.operands(x, bias)
    modulation = attention.amm_matrix if attention.amm_is_active else None
    return AttentionMap(attention.grid, attention_probabilities(q, k, bias), modulation)


@torch.inference_mode()
def attention_maps(
    model: nn.Module, blocks: Sequence[int], x: Tensor, t: Tensor, y: Tensor
) -> dict[int, AttentionMap | MediatorMap]:
    """The maps of some of the model's blocks when it is called with x, t, y. Raises ValueError for blocks it does not have.

    The forward runs as ever; while it does, a hook reads what each block's attention is given.
    """
    check_blocks(blocks, len(model.blocks))
    maps = {}
    with contextlib.ExitStack() as hooks:
        for block in blocks:

            def keep(attention: BiasedAttention, inputs: tuple, block: int = block) -> None:
                maps[block] = map_of(attention, *inputs)

            hooks.callback(model.blocks[block].attn.register_forward_pre_hook(keep).remove)
        model(x, t, y)
    return maps


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    outside = [block for block in blocks if not 0 <= block < depth]
    if outside:
        raise ValueError(f"block {outside[0]} does not exist: the model has blocks 0 to {depth - 1}")
