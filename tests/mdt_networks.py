"""Small MDTv2s, and what they are given."""

import torch

from models import create_model
from models.mdt import TokenSubset
from tests.shared import perturb

TINY = {"width": 16, "num_heads": 2, "input_size": 16, "num_classes": 10}


def random_model(seed=0, **overrides):
    """2 + 2 + 2 blocks, 8 x 8 tokens, eval mode; no weight is zero, so that every part shows in the output."""
    torch.manual_seed(seed)
    return perturb(create_model("MDTv2-S/2", **{**TINY, "depth": 6, "decode_layer": 2, **overrides}), 0.3).eval()


def inputs(batch=2, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 16, 16, generator=draws)
    return x, torch.randint(0, 1000, (batch,), generator=draws), torch.randint(0, 11, (batch,), generator=draws)


def some_tokens(samples=2, ratio=0.4, seed=1):
    """int64 (samples, K) of 64."""
    return TokenSubset(64, 0, 1).kept(torch.rand(samples, 64, generator=torch.Generator().manual_seed(seed)), ratio)
