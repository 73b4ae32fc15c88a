"""What a training step keeps in memory for the way back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_for_backward(call: Callable[[], object], network: nn.Module) -> int:
    """The bytes of the tensors that autograd holds for the way back at the worst moment of a call, each piece of memory once.

    The network's weights and buffers are left out: they are there anyway; what is made of them in the call, as weights in
    another precision or gathered biases, counts, though it does not grow with the batch. Blocks that are computed again on the
    way back (:func:`models.layers.recompute_blocks`) hold their inputs in another way, which is not seen here.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}
    total = largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total, largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in held:
            held[storage.data_ptr()] = storage.nbytes()
            total += storage.nbytes()
            largest = max(largest, total)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal total
        total -= held.pop(tensor.untyped_storage().data_ptr(), 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        call()
    return largest
