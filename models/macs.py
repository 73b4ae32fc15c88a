"""Counting the work of a network without doing it."""

import functools
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.registry import build_network


def fresh_on_meta(config: object) -> nn.Module:
    """The network of a config on the meta device, in eval mode: shapes without values."""
    with torch.device("meta"):
        return build_network(config).eval()


def trained_parameters(config: object) -> int:
    """How many numbers are trained: without fixed position tables."""
    return sum(parameter.numel() for parameter in fresh_on_meta(config).parameters() if parameter.requires_grad)


@functools.cache  # an XL takes a second to count, and reports ask again
def multiply_accumulates(config: object) -> int:
    """Multiply-accumulates of the products and convolutions in a forward pass of one image (the papers' "FLOPs")."""
    model = fresh_on_meta(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        model(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() // 2  # torch counts two for each multiply-accumulate


@functools.cache
def training_multiply_accumulates(config: object, masked: bool) -> int:
    """Multiply-accumulates of the products and convolutions that a training step does for one image: forward, and back to every
    trained weight, of an unmasked pass and, with ``masked``, of a masked one that drops the mean share of the tokens.

    Raises ValueError for ``masked`` where the network has no masked pass.
    """
    if masked and not hasattr(config, "mask_places"):
        raise ValueError(f"masked=True: a network with {type(config).__name__} has no masked pass")
    model, passes = fresh_on_meta(config).train(), 2 if masked else 1
    corrected = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        x = torch.empty(passes, config.in_channels, config.input_size, config.input_size)
        kwargs = {"y": torch.empty(passes, dtype=torch.long)}
        if masked:
            kwargs["kept"] = [
                place.kept(torch.empty(1, place.num_tokens), (place.low + place.high) / 2) for place in config.mask_places
            ]
        model(x, torch.empty(passes), **kwargs).sum().backward()
    return counter.get_total_flops() // 2


def _convolution_backward_flops(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, *rest, out_shape) -> int:
    """As many for each wanted gradient, of input and weight, as forward. All arguments are shapes. torch's own formula counts
    the weight's gradient of a depthwise convolution as that of a dense one."""
    wanted = rest[-1]
    pixels = (x if transposed else grad)[2:]
    return 2 * grad[0] * math.prod(pixels) * math.prod(weight) * sum(wanted[:2])
