"""AMM: the published matrices, the doubled-key attention against the plain formula, and the placements."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models import create_model
from models.amm import AMM, amm_matrix, default_amm, parse_amm
from models.attention import Attention, RelativePositionBias

GOLDEN = Path(__file__).parent / "golden" / "amm.npz"


@pytest.mark.parametrize("form, grid", [("exp", 8), ("exp", 16), ("exp", 32), ("cos", 16), ("cos", 32)])
def test_golden_matrix(form, grid):
    with np.load(GOLDEN) as golden:
        expected = torch.from_numpy(golden[f"amm_{form}/{grid}"])
    matrix = amm_matrix(grid, form)
    assert matrix.dtype == torch.float32
    assert_close(matrix, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix == 0, expected == 0)


def plain_matrix(grid, form):
    """The formula of the specification, one pair of tokens at a time."""
    f = 2 * math.pi / (4 * (grid - 1) * math.sqrt(2))
    tokens = [(i // grid, i % grid) for i in range(grid * grid)]
    last = tokens[3 * grid - 1] if grid > 2 else tokens[-1]
    matrix = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            if (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= last[0] ** 2 + last[1] ** 2:
                cosine = math.cos(f * math.dist(a, b))
                matrix[i, j] = 0.5 * math.exp(cosine) if form == "exp" else 1.3 * cosine
    return matrix


@pytest.mark.parametrize("form", ["exp", "cos"])
@pytest.mark.parametrize("grid", [2, 3, 4, 7])
def test_matrix_is_the_formula(grid, form):
    matrix = amm_matrix(grid, form, torch.float64)
    assert_close(matrix, plain_matrix(grid, form), rtol=1e-12, atol=1e-12)
    assert_close(matrix, matrix.T, rtol=0, atol=0)
    assert matrix.min() >= 0
    if form == "exp":
        assert (matrix.min() == 0) == (grid > 3)  # nothing is cut on small grids


@pytest.mark.parametrize("grid", [1, 0])
def test_no_matrix_for_one_token(grid):
    with pytest.raises(ValueError, match="side 2 or more"):
        amm_matrix(grid, "exp")
    with pytest.raises(ValueError, match="side 2 or more"):
        Attention(8, 2, grid, position_bias=None, amm="exp")


def plain_attention(attention, x, matrix):
    """softmax(q k^T / sqrt(d) + bias), times M without renormalising, times v; in float64."""
    B, N, D = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(D // heads)
    if hasattr(attention, "rel_pos_bias"):
        grid = math.isqrt(N)
        table = attention.rel_pos_bias.relative_position_bias_table
        for i in range(N):
            for j in range(N):
                rows, columns = i // grid - j // grid + grid - 1, i % grid - j % grid + grid - 1
                scores[:, :, i, j] += table[rows * (2 * grid - 1) + columns]
    return attention.proj(((scores.softmax(-1) * matrix) @ v).transpose(1, 2).reshape(B, N, D))


def random_attention(grid, position_bias, amm):
    torch.manual_seed(0)
    bias = RelativePositionBias(grid, 3) if position_bias else None
    attention = Attention(12, 3, grid, position_bias=bias, amm=amm).eval().double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    return attention, torch.randn(2, grid * grid, 12, dtype=torch.float64)


@pytest.mark.parametrize("position_bias", [True, False])
@pytest.mark.parametrize("form", ["exp", "cos", None])
@pytest.mark.parametrize("grid", [2, 3, 5])
@torch.no_grad()
def test_attention_is_the_plain_formula(grid, form, position_bias):
    """The doubled keys hold the logarithms of M in float32."""
    attention, x = random_attention(grid, position_bias, form)
    matrix = plain_matrix(grid, form) if form else 1.0
    assert_close(attention(x, attention.score_bias()), plain_attention(attention, x, matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position_bias", [True, False])
@torch.no_grad()
def test_no_modulation_in_training(position_bias):
    attention, x = random_attention(4, position_bias, "exp")
    attention(x, attention.score_bias())  # fills the cache
    attention.train()
    assert_close(attention(x, attention.score_bias()), plain_attention(attention, x, 1.0))


def test_gradients_through_the_modulated_attention():
    """Zeros of M are -inf in the doubled keys' bias; they must not become NaN on the way back."""
    attention, x = random_attention(5, True, "cos")
    attention(x, attention.score_bias()).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "name, cfg_scale, input_size, expected",
    [
        ("EDT-S/2", 1.0, 32, "exp:7,10"),
        ("EDT-S/2", 1.5, 32, "exp:7,10"),
        ("EDT-S/2", 2.0, 32, "exp:8"),
        ("EDT-S/2", 1.0, 64, "cos:10"),
        ("EDT-S/2", 4.0, 64, "cos:10"),
        ("EDT-B/2", 1.5, 32, "exp:7,10"),
        ("EDT-B/2", 2.0, 64, "exp:8"),
        ("EDT-XL/2", 1.0, 32, "exp:23,25"),
        ("EDT-XL/2", 4.0, 64, "exp:23,25"),
    ],
)
def test_published_placements(name, cfg_scale, input_size, expected):
    assert str(default_amm(name, cfg_scale, input_size)) == expected


@pytest.mark.parametrize("input_size, expected", [(32, {7: "exp", 10: "exp"}), (64, {10: "cos"})])
def test_the_network_takes_the_published_placement(input_size, expected):
    tiny = {"widths": (16, 24, 32, 24, 16), "num_heads": 2, "num_classes": 10}
    model = create_model("EDT-S/2", **tiny, input_size=input_size, amm=True)
    assert {i: block.attn.amm for i, block in enumerate(model.blocks) if block.attn.amm} == expected


@pytest.mark.parametrize("text", ["exp:7,10", "cos:10", "exp:0"])
def test_text_round_trip(text):
    amm = parse_amm(text)
    assert str(amm) == text
    assert amm == AMM(form=text[:3], blocks=tuple(int(block) for block in text[4:].split(",")))


@pytest.mark.parametrize("text", ["", "exp", "exp:", "exp:7,", "exp:a", "sin:7", "7,10", "True"])
def test_text_that_is_not_understood(text):
    with pytest.raises(ValueError, match=r"amm=.*for example exp:7,10"):
        parse_amm(text)


def test_model_without_a_published_placement():
    with pytest.raises(ValueError, match="no AMM placement is published for DiT-Z"):
        default_amm("DiT-Z")
    with pytest.raises(ValueError, match="at least one block"):
        AMM(form="exp", blocks=())
