"""The maps that are computed again are those that the fused kernels used: applied to the values, they give a block's output."""

import math

import pytest
import torch
from torch.testing import assert_close

from models import create_model
from models.amm import amm_matrix
from models.attention import Attention
from models.attention_maps import AttentionMap, MediatorMap, attention_maps
from models.mediators import MediatorAttention
from tests.shared import perturb


def observed(model, blocks):
    """The maps, and what each block's attention was given and returned in the same call."""
    torch.manual_seed(1)
    config, seen, handles = model.config, {}, []
    for i, block in enumerate(model.blocks):
        handles.append(block.attn.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out)})))
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    maps = attention_maps(model.eval(), blocks, x, torch.tensor([500.0, 20.0]), torch.tensor([3, 10]))
    for handle in handles:
        handle.remove()
    return maps, seen


def heads(attention, projected):
    """(B, N, D) -> (B, H, N, D/H)."""
    B, N, _ = projected.shape
    return projected.view(B, N, attention.num_heads, -1).transpose(1, 2)


def model_of(name, **settings):
    """In float64, but for the logarithms of AMM: the weights are large, so that attention is far from even."""
    torch.manual_seed(0)
    return perturb(create_model(name, **settings), 0.2).double()


@pytest.mark.parametrize(
    "name, amm, modulated",
    [("EDT-Ti/2", "exp:0,4", {0, 4}), ("EDT-Ti/2", "cos:5", {5}), ("DiT-Ti/2", "exp:1", {1}), ("MDTv2-Ti/2", "exp:0,3", {0, 3}),
     ("SiT-Ti/2", False, set())],
)  # fmt: skip
@torch.no_grad()
def test_maps_of_plain_attention(name, amm, modulated):
    model = model_of(name, amm=amm)
    blocks = range(len(model.blocks))
    maps, seen = observed(model, blocks)
    for i in blocks:
        attention, found, (x, out) = model.blocks[i].attn, maps[i], seen[i]
        assert isinstance(attention, Attention) and isinstance(found, AttentionMap)
        v = heads(attention, attention.qkv(x).chunk(3, dim=2)[2])
        assert_close(attention.proj((found.applied @ v).transpose(1, 2).flatten(2)), out, rtol=1e-5, atol=1e-5)
        assert found.probabilities.shape == (2, attention.num_heads, found.grid**2, found.grid**2)
        assert_close(found.probabilities.sum(-1), torch.ones(2, attention.num_heads, found.grid**2).double())
        assert (found.modulation is not None) == (i in modulated)
        if i in modulated:  # not renormalised
            expected = amm_matrix(found.grid, attention.amm).double()
            assert torch.equal(found.modulation, expected)
            assert_close(found.applied, found.probabilities * expected)
            assert (found.applied.sum(-1) - 1).abs().max() > 0.01
        else:
            assert found.applied is found.probabilities


@pytest.mark.parametrize("mediators, layers", [(1, None), (4, 2), (9, None), (64, None)])
@torch.no_grad()
def test_maps_of_mediators(mediators, layers):
    """9 mediators are pooled from windows that overlap."""
    model = model_of("SiT-Ti/2", mediator_num=mediators, mediator_layers=layers)
    maps, seen = observed(model, range(4))
    for i in range(4):
        attention, found, (x, out) = model.blocks[i].attn, maps[i], seen[i]
        if layers is not None and i >= layers:
            assert isinstance(found, AttentionMap)
            continue
        assert isinstance(attention, MediatorAttention) and isinstance(found, MediatorMap)
        assert found.gather.shape == (2, 3, mediators, 64) and found.read.shape == (2, 3, 64, mediators)
        joint = found.read @ found.gather
        for weights in (found.gather, found.read, joint):
            assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]).double())
        v = attention.qkv(x).chunk(3, dim=2)[2]
        image = v.transpose(1, 2).unflatten(2, (8, 8))
        convolved = attention.dwc(image).flatten(2).transpose(1, 2)
        attended = (joint @ heads(attention, v)).transpose(1, 2).flatten(2)
        assert_close(attention.proj(attended + convolved), out, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_looking_leaves_the_network_as_it_was():
    model = model_of("EDT-Ti/2", amm="exp:4").eval()
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([500.0, 20.0]), torch.tensor([3, 10])
    before = model(*inputs)
    attention_maps(model, [0, 4], *inputs)
    assert torch.equal(model(*inputs), before)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
    with pytest.raises(ValueError, match="block 6 does not exist: the model has blocks 0 to 5"):
        attention_maps(model, [4, 6], *inputs)


@torch.no_grad()
def test_maps_in_closed_form():
    """Without queries the scores are the position bias alone: of a table with log 3 at offset 0, a token weighs itself
    thrice. Without a bias all tokens weigh the same."""
    model = model_of("EDT-Ti/2", amm="exp:5")
    attention = model.blocks[5].attn
    attention.qkv.weight.zero_()
    attention.qkv.bias.zero_()
    table = attention.rel_pos_bias.relative_position_bias_table
    table.zero_()
    table[(len(table) - 1) // 2] = math.log(3)
    maps, _ = observed(model, [5])
    expected = (torch.ones(64, 64) + 2 * torch.eye(64)).double() / 66
    assert_close(maps[5].probabilities, expected.expand(2, 2, 64, 64))
    assert_close(maps[5].applied, (expected * amm_matrix(8, "exp").double()).expand(2, 2, 64, 64))
