"""Counting the work of a network without doing it."""

import functools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.registry import build_network


def fresh_on_meta(config: object) -> nn.Module:
    """The network of a config on the meta device, in eval mode: shapes without values."""
    with torch.device("meta"):
        return build_network(config).eval()


@functools.cache  # an XL takes a second to count, and reports ask again
def multiply_accumulates(config: object) -> int:
    """Multiply-accumulates of the products and convolutions in a forward pass of one image (the papers' "FLOPs")."""
    model = fresh_on_meta(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        model(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() // 2  # torch counts two for each multiply-accumulate
