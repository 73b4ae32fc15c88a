"""Attention through PyTorch's FlexAttention: a position bias and AMM are computed inside one fused CUDA kernel."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from models.amm import MAXIMA

MIN_TOKENS = 128  # a program of the kernel takes 64 queries or more; below, a bias is small and SDPA takes it as a mask
MIN_HEAD_DIM = 16  # of the kernel's products, which round a head dimension up to a power of two, without a copy
MAX_ROUNDING = 1.25  # 52 becomes 64; 72 would become 128
MIN_CAPABILITY = (8, 0)
TILES = 128  # the largest side of the kernel's tiles of scores; the mask's blocks are whole tiles
AMM_TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}  # with larger ones AMM's arithmetic does not fit a thread's registers
COSINE_SERIES = tuple((-1) ** n / math.factorial(2 * n) for n in range(8))  # of x^2; its rest is 5e-11 at x = pi/2


def flex_available(q: Tensor, needs_grad: bool) -> bool:
    """Whether :func:`flex_attention_with` has a fused kernel for q (B, H, N, d) here.

    Only while torch.compile traces: uncompiled, FlexAttention stores all scores. Only without gradients: the kernel would add
    up a bias's by one atomic addition for each score, in no fixed order. Only in half precision: its products of float32 do
    without tensor cores.
    """
    if needs_grad or q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    tokens, head_dim = q.shape[2:]
    rounded = max(1 << (head_dim - 1).bit_length(), MIN_HEAD_DIM)
    if not torch.compiler.is_compiling() or tokens < MIN_TOKENS or rounded > MAX_ROUNDING * head_dim:
        return False
    properties = torch.cuda.get_device_properties(q.device)  # to a compiled graph a constant
    return (properties.major, properties.minor) >= MIN_CAPABILITY


def flex_attention_with(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grid: int = 0, amm: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) [* M] v, of q, k, v (B, H, N, d) with N = grid^2 -> (B, H, N, d).

    bias: (1 or B, H, N, N), or None. amm: None, or the form of M = ``amm_matrix(grid, amm)``, which is not renormalised. log M,
    added to the scores, gives softmax(s + log M) v, and exp(lse_M - lse), of the log-sum-exps with and without log M, takes
    M out of its denominator. The second comes from a pass that needs no values: a compiled one drops them, with their product.
    """
    flex = functools.partial(
        flex_attention,
        block_mask=_no_mask(q.shape[2], q.device),
        scale=q.shape[-1] ** -0.5,
        kernel_options={"BLOCKS_ARE_CONTIGUOUS": True} | (AMM_TILES if amm else {}),  # there is only one block
    )
    if amm is None:
        return flex(q, k, v, score_mod=_score_mod(bias, grid, None))
    out, modulated = flex(q, k, v, score_mod=_score_mod(bias, grid, amm), return_aux=AuxRequest(lse=True))
    _, plain = flex(q, k, k[..., :MIN_HEAD_DIM], score_mod=_score_mod(bias, grid, None), return_aux=AuxRequest(lse=True))
    factor = (modulated.lse - plain.lse).exp().to(out.dtype)  # (B, H, N)
    # Written in the layout (B, N, H, d), which the output projection reads.
    return (out.transpose(1, 2) * factor.transpose(1, 2)[..., None]).transpose(1, 2)


def _no_mask(tokens: int, device: torch.device) -> BlockMask:
    """One block that holds all scores. FlexAttention's own default computes in addition what only gradients need."""
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32, device=device),
        torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device),
        BLOCK_SIZE=-(-tokens // TILES) * TILES,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


def _score_mod(bias: Tensor | None, grid: int, amm: str | None) -> Callable[..., Tensor]:
    """What FlexAttention changes each score with."""
    shared = bias[0] if bias is not None and len(bias) == 1 else None  # an index 0 would be a tensor on the device

    def modify(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias is not None:
            score = score + (bias[sample, head, query, key] if shared is None else shared[head, query, key])
        return score if amm is None else score + log_modulation(query, key, grid, amm)

    return modify


def log_modulation(query: Tensor, key: Tensor, grid: int, form: str) -> Tensor:
    """log M of pairs of tokens, in float32, from their indices: the logarithm of ``amm_matrix(grid, form)``.

    It is computed for each score, in a dozen operations: read, M would take as much memory traffic as a bias. The row and the
    column of a token are found once for a row or column of scores; cos(f d), a power series in d^2, takes neither a root nor
    a cosine.
    """
    rows, columns = query // grid - key // grid, query % grid - key % grid
    squared = rows * rows + columns * columns
    angle = squared.float() * (math.pi**2 / (8 * (grid - 1) ** 2))  # (f d)^2, at most (pi/2)^2
    cosine = COSINE_SERIES[-1]
    for coefficient in reversed(COSINE_SERIES[:-1]):
        cosine = cosine * angle + coefficient
    log = cosine + math.log(MAXIMA["exp"]) - 1 if form == "exp" else cosine.clamp(min=0).log() + math.log(MAXIMA["cos"])
    return log.masked_fill(squared > (grid - 1) ** 2 + 4, -math.inf)
