"""FlexAttention, uncompiled, against the formula written out. Its fused kernel only a GPU has: see test_cuda.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from models import flex
from models.amm import amm_matrix
from models.attention import Attention, RelativePositionBias
from models.flex import flex_attention_with, flex_available, log_modulation

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def written_out(q, k, v, bias, grid, amm):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    probabilities = (scores if bias is None else scores + bias).softmax(-1)
    return (probabilities * amm_matrix(grid, amm, q.dtype) if amm else probabilities) @ v


def draw(grid, bias_samples, *, head_dim=52, dtype=torch.float64):
    """q, k, v as a network slices them from one product, and a bias."""
    torch.manual_seed(0)
    qkv = torch.randn(2, grid**2, 3, 3, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.randn(bias_samples, 3, grid**2, grid**2, dtype=dtype) if bias_samples else None
    return *qkv, bias


@pytest.mark.parametrize("bias_samples", [0, 1, 2])
@pytest.mark.parametrize("amm", [None, "exp", "cos"])
@torch.no_grad()
def test_the_formula(bias_samples, amm):
    """log M is of float32."""
    values = draw(12, bias_samples)
    actual = flex_attention_with(*values, 12, amm)
    assert actual.dtype == torch.float64
    assert_close(actual, written_out(*values, 12, amm), rtol=1e-6, atol=1e-6 if amm else 1e-12)


@pytest.mark.parametrize("grid, head_dim", [(3, 16), (4, 64)])
@torch.no_grad()
def test_half_precision(grid, head_dim):
    values = draw(grid, 1, head_dim=head_dim)
    actual = flex_attention_with(*(value.bfloat16() for value in values), grid, "exp")
    assert actual.dtype == torch.bfloat16
    expected = written_out(*values, grid, "exp")
    assert (actual - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("form", ["exp", "cos"])
@pytest.mark.parametrize("grid", [2, 3, 5, 8, 16, 32])
def test_logarithm_of_the_matrix(grid, form):
    tokens = torch.arange(grid**2)
    actual, expected = log_modulation(tokens[:, None], tokens, grid, form).exp(), amm_matrix(grid, form)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, rtol=1e-6, atol=1e-7)  # cos at opposite corners is 0 up to rounding
    assert torch.equal(actual < 1e-6, expected < 1e-6)


@pytest.mark.parametrize("amm", [None, "exp", "cos"])
@torch.no_grad()
def test_the_attention_of_a_network(amm):
    """Against the fused kernel with doubled keys."""
    torch.manual_seed(0)
    grid, heads, width = 6, 2, 40
    attention = Attention(width, heads, grid, position_bias=RelativePositionBias(grid, heads), amm=amm).eval()
    for parameter in attention.parameters():
        parameter.normal_(std=0.3)
    x = torch.randn(2, grid**2, width)
    q, k, v = attention.qkv(x).view(2, grid**2, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = flex_attention_with(q, k, v, attention.rel_pos_bias()[None], grid, amm)
    actual = attention.proj(out.transpose(1, 2).reshape(2, grid**2, width))
    assert_close(actual, attention(x, attention.score_bias()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias_samples, amm", [(0, "cos"), (1, "exp"), (2, None)])
@torch.no_grad()
def test_one_graph_for_all_calls(bias_samples, amm):
    """Where a block is compiled, neither the functions made at each call nor a new bias compile it again."""

    def block(q, k, v, bias):
        return flex_attention_with(q * 2, k, v, bias, 12, amm) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    q, k, v, bias = draw(12, bias_samples, dtype=torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            bias = bias if bias is None else torch.randn_like(bias)
            assert_close(compiled(q, k, v, bias), written_out(q * 2, k, v, bias, 12, amm) + 1, rtol=1e-4, atol=1e-4)


GOOD = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "shape": (8, 6, 256, 52)}


@pytest.mark.parametrize(
    "changes, capability, compiling, needs_grad, expected",
    [
        ({}, (9, 0), True, False, True),
        ({"dtype": torch.float16}, (8, 0), True, False, True),
        ({"dtype": torch.float32}, (9, 0), True, False, False),
        ({"device": torch.device("cpu")}, (9, 0), True, False, False),
        ({"shape": (8, 6, 64, 52)}, (9, 0), True, False, False),
        ({"shape": (8, 6, 256, 8)}, (9, 0), True, False, False),
        ({"shape": (8, 6, 256, 72)}, (9, 0), True, False, False),
        ({"shape": (8, 6, 256, 64)}, (9, 0), True, False, True),
        ({}, (7, 5), True, False, False),
        ({}, (9, 0), False, False, False),
        ({}, (9, 0), True, True, False),
    ],
)
def test_where_it_is_available(monkeypatch, changes, capability, compiling, needs_grad, expected):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(flex.torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(flex.torch.compiler, "is_compiling", lambda: compiling)
    assert flex_available(SimpleNamespace(**GOOD | changes), needs_grad) is expected


def test_not_on_a_cpu():
    [q, *_] = draw(12, 0, dtype=torch.bfloat16)
    compiled = torch.compile(lambda q: q + flex_available(q, False), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), q)
