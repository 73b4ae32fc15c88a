"""A softmax that torch.compile leaves whole where its own is slower."""

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension. In half precision and without gradients a compiled graph calls PyTorch's own kernel: the one
    that Inductor writes for a CPU takes three times as long."""
    opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.dtype in (torch.bfloat16, torch.float16)
    return _whole_softmax(x) if opaque else x.softmax(-1)


@torch.library.custom_op("efficient_diffusion_transformers::softmax", mutates_args=())
def _whole_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


_whole_softmax.register_fake(torch.empty_like)
