"""SiT: the published numbers, attention mediators against the written-out formula, and the cached biases."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models import create_model, model_names
from models.layers import compile_blocks
from models.macs import multiply_accumulates
from models.mediators import MediatorAttention
from models.registry import PUBLISHED, VARIANTS, model_config
from models.sit import SiTConfig, config_from_state, is_sit_state
from tests.shared import GOLDEN, golden_network, match

TINY = {"width": 16, "num_heads": 2, "input_size": 16, "num_classes": 10}
KEYS = json.loads((GOLDEN / "sit_state_dict_keys.json").read_text())
TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")


def randomize(module, seed=0):
    """No weight is zero, so that every part shows in the output."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module.eval()


def random_model(seed=0, **overrides):
    return randomize(create_model("SiT-S/2", **{**TINY, "depth": 3, **overrides}), seed)


def inputs(batch=2, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 16, 16, generator=draws)
    return x, torch.rand(batch, generator=draws), torch.randint(0, 11, (batch,), generator=draws)


# The published numbers


@pytest.mark.parametrize(
    "numbers, mediator_num", [("sit_tiny", None), ("sit_tiny_mediator4", 4), ("sit_tiny_mediator16", 16)]
)  # fmt: skip
def test_golden_forward(numbers, mediator_num):
    state, data = golden_network(numbers)
    model = create_model("SiT-S/2", **TINY, mediator_num=mediator_num).eval()
    model.load_state_dict(state)
    x, t, y = data["x"], data["t"], data["y"]
    with torch.no_grad():
        match(model(x, t, y), data["out"])
        match(model(x, t, y), data["out"])  # from cached biases
        assert ("out_cfg" in data) == (mediator_num != 16)
        if "out_cfg" in data:
            doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
            match(model.forward_with_cfg(*doubled, data["cfg_scale"].item()), data["out_cfg"])


@pytest.mark.parametrize("row", KEYS)
def test_state_dict_is_the_published_one(row):
    name, _, mediators = row.partition(" mediators=")
    settings = {"mediator_num": int(mediators)} if mediators else {}
    with torch.device("meta"):
        state = create_model(name, **settings).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == KEYS[row]
    assert is_sit_state(state)
    assert config_from_state(state) == model_config(name, **settings)


@pytest.mark.parametrize("label", [label for label in PUBLISHED if label.startswith("SiT")])
def test_published_sizes(label):
    """The papers seem to count a little more than products and convolutions, about one for each element of every norm: at most
    0.3 % of the sum."""
    name, settings = VARIANTS.get(label, (label, {}))
    config, published = model_config(name, **settings), PUBLISHED[label]
    assert 0 < published.gmac - multiply_accumulates(config) / 1e9 + 0.005 < 0.003 * published.gmac + 0.005
    if published.params_millions:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in create_model(name).parameters() if p.requires_grad)
        assert round(parameters / 1e6) == published.params_millions


def test_every_patch_side_runs():
    for name in model_names():
        if name.startswith("SiT"):
            assert multiply_accumulates(model_config(name, depth=1)) > 0


# Mediators


def written_out(attention, x):
    """The specification's formula, step by step, with the softmaxes in full."""
    n, H, M = attention.grid, attention.num_heads, attention.an_bias.shape[1]
    B, N, D = x.shape
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(D, dim=2)

    def per_head(tokens):
        return torch.stack(tokens.split(D // H, dim=2), dim=1)

    pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(B, D, n, n), math.isqrt(M)).reshape(B, D, M).transpose(1, 2)
    bias_1, bias_2 = torch.zeros(H, M, N, dtype=x.dtype), torch.zeros(H, N, M, dtype=x.dtype)
    an, na = (F.interpolate(t, (n, n), mode="bilinear") for t in (attention.an_bias, attention.na_bias))
    for row in range(n):
        for column in range(n):
            j = row * n + column
            bias_1[:, :, j] = an[:, :, row, column] + attention.ah_bias[0, :, :, row, 0] + attention.aw_bias[0, :, :, 0, column]
            bias_2[:, j] = na[:, :, row, column] + attention.ha_bias[0, :, row, 0] + attention.wa_bias[0, :, 0, column]
    scale = (D // H) ** -0.5
    values = torch.softmax(scale * per_head(pooled) @ per_head(k).mT + bias_1, -1) @ per_head(v)
    out = torch.softmax(scale * per_head(q) @ per_head(pooled).mT + bias_2, -1) @ values
    out = torch.cat(out.unbind(1), dim=2)
    local = F.conv2d(v.transpose(1, 2).reshape(B, D, n, n), attention.dwc.weight, attention.dwc.bias, padding=1, groups=D)
    return (out + local.flatten(2).transpose(1, 2)) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("grid, mediator_num", [(8, 4), (8, 9), (7, 16), (7, 49), (5, 1), (5, 25), (1, 1), (9, 9)])
def test_mediators_are_the_written_out_formula(grid, mediator_num):
    """Also where sqrt(M) does not divide the grid: the pool's windows then overlap."""
    attention = randomize(MediatorAttention(24, 3, grid, mediator_num).double())
    x = torch.randn(2, grid**2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = written_out(attention, x)
        assert_close(attention(x, attention.score_bias()), expected, rtol=1e-12, atol=1e-12)
    assert_close(attention(x, attention.score_bias()), expected, rtol=1e-12, atol=1e-12)


def test_work_grows_linearly_with_the_tokens():
    """Four times the tokens: four times the work, but for what does not depend on them (the conditioning)."""
    settings = [{"depth": 2, "input_size": side} for side in (32, 64, 128)]
    work = {row["input_size"]: multiply_accumulates(model_config("SiT-S/2", **row, mediator_num=16)) for row in settings}
    assert work[128] - work[64] == 4 * (work[64] - work[32])
    plain = {row["input_size"]: multiply_accumulates(model_config("SiT-S/2", **row)) for row in settings}
    assert plain[128] - plain[64] > 5 * (plain[64] - plain[32])


def test_nothing_of_size_tokens_squared_is_kept():
    model = create_model("SiT-S/2", depth=1, input_size=64, mediator_num=4).eval()
    N, sizes = 1024, []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
        model(torch.randn(1, 4, 64, 64), torch.rand(1), torch.zeros(1, dtype=torch.long))
    assert max(sizes) <= N * 4 * 384  # the MLP's hidden layer
    assert N * 4 * 384 < 6 * N * N  # the scores of six heads


@pytest.mark.parametrize("number, nearest", [(5, "4 and 9"), (0, "1"), (-3, "1"), (65, "64"), (81, "64"), (63, "49 and 64")])
def test_wrong_number_of_mediators(number, nearest):
    with pytest.raises(ValueError, match=rf"mediator_num must be a square .* got {number}: the nearest (is|are) {nearest}$"):
        create_model("SiT-S/2", **TINY, mediator_num=number)
    with pytest.raises(ValueError, match="mediator_num"):
        MediatorAttention(16, 2, 8, number)


@pytest.mark.parametrize("layers", [1, 2, 3, None])
def test_mediators_in_the_first_blocks(layers):
    model = random_model(mediator_num=4, mediator_layers=layers)
    kinds = [isinstance(block.attn, MediatorAttention) for block in model.blocks]
    assert kinds == [i < (layers or 3) for i in range(3)]
    plain = random_model()
    with torch.no_grad():
        assert not torch.allclose(model(*inputs()), plain(*inputs()), atol=1e-3)


# Configs, channels, AMM


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mediator_layers": 2}, "mediator_layers=2 needs mediator_num"),
        ({"mediator_num": 4, "mediator_layers": 13}, "mediator_layers must be 1 to 12"),
        ({"mediator_num": 4, "mediator_layers": 0}, "mediator_layers must be 1 to 12"),
        ({"keep_sigma": True, "learn_sigma": False}, "keep_sigma=True"),
        ({"num_heads": 3}, "16 is not divisible by the number of heads 3"),
        ({"width": 18}, "divisible by 4"),
        ({"input_size": 15}, "divisible by the patch side 2, got 15"),
        ({"depth": 0}, "depth must be positive"),
        ({"num_classes": 0}, "num_classes must be positive"),
        ({"depths": (1, 2)}, "no setting depths"),
        ({"amm": "exp:12"}, "those that can have it are 0 to 11"),
        ({"amm": "exp:3", "mediator_num": 4, "mediator_layers": 4}, "those that can have it are 4 to 11"),
        ({"amm": "exp:3", "mediator_num": 4}, "those that can have it are none"),
        ({"amm": True}, "no AMM placement is published for SiT-S/2"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("SiT-S/2", **{**TINY, **overrides})


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 32, 32), (2, 4, 16, 8)])
def test_wrong_input_shape(shape):
    with pytest.raises(ValueError, match=r"takes latents of shape \(4, 16, 16\)"):
        random_model()(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("mediator_num", [None, 4])
def test_the_second_half_of_the_channels(mediator_num):
    first = random_model(mediator_num=mediator_num)
    both = random_model(mediator_num=mediator_num, keep_sigma=True)
    with torch.no_grad():
        assert torch.equal(both(*inputs())[:, :4], first(*inputs()))
        assert both(*inputs()).shape == (2, both.config.out_channels, 16, 16) == (2, 8, 16, 16)
        assert random_model(learn_sigma=False)(*inputs()).shape == (2, 4, 16, 16)
        x, t, y = inputs()
        doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
        conditional, unconditional = both(*doubled).chunk(2)
        guided = both.forward_with_cfg(*doubled, 3.0, channels=None)
        match(guided[:2, :4], unconditional[:, :4] + 3 * (conditional - unconditional)[:, :4])
        match(guided[:2, 4:], conditional[:, 4:])


def test_amm_in_the_blocks_with_plain_attention():
    model = random_model(mediator_num=4, mediator_layers=1, amm="exp:2")
    assert [getattr(block.attn, "amm", None) for block in model.blocks] == [None, None, "exp"]
    without = random_model(mediator_num=4, mediator_layers=1)
    with torch.no_grad():
        assert not torch.allclose(model(*inputs()), without(*inputs()), atol=1e-3)


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("SiT-S/2", depth=1, mediator_num=16)
    attention = model.blocks[0].attn
    for name in TABLES:
        assert getattr(attention, name).std().item() == pytest.approx(0.02, rel=0.05)
    # PyTorch's default of a convolution over 9 values: uniform within 1/3
    for tensor in (attention.dwc.weight, attention.dwc.bias):
        assert 0.32 < tensor.abs().max() <= 1 / 3
    with torch.no_grad():
        out = model(torch.randn(1, 4, 32, 32), torch.rand(1), torch.zeros(1, dtype=torch.long))
    assert torch.equal(out, torch.zeros(1, 4, 32, 32))


# Invariances, gradients, precision


@pytest.mark.parametrize("settings", [{}, {"mediator_num": 4}, {"mediator_num": 9, "mediator_layers": 2}])
def test_batch_composition_does_not_matter(settings):
    model = random_model(**settings).double()
    x, t, y = inputs(5)
    x = x.double()
    with torch.no_grad():
        together = model(x, t, y)
        for k in range(5):
            assert_close(model(x[k : k + 1], t[k : k + 1], y[k : k + 1]), together[k : k + 1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mediator_num", [4, 9])
def test_gradients_reach_every_weight(mediator_num):
    """Also in eval mode and after sampling filled the cache."""
    model = random_model(mediator_num=mediator_num)
    with torch.no_grad():
        model(*inputs())
    model(*inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


def test_bf16_is_near_fp32():
    model = random_model(mediator_num=4)
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs())
            assert {bias.dtype for bias in model.blocks[0].attn.score_bias()} == {torch.bfloat16}
        match(model(*inputs()), exact)
        assert {bias.dtype for bias in model.blocks[0].attn.score_bias()} == {torch.float32}
    assert 0 < (rounded.float() - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks():
    model = random_model(mediator_num=4, depth=1)
    with torch.no_grad():
        eager = model(*inputs())
        compile_blocks(model)
        match(model(*inputs()), eager)


# The cached biases


def test_biases_are_expanded_once_for_sampling(monkeypatch):
    calls = []
    resized = MediatorAttention._resized
    monkeypatch.setattr(MediatorAttention, "_resized", lambda self, table: calls.append(1) or resized(self, table))
    model = random_model(mediator_num=4)
    with torch.inference_mode():
        first = model(*inputs())
        assert len(calls) == 2 * 3
        assert torch.equal(model(*inputs()), first)
        assert len(calls) == 2 * 3
    match(model(*inputs()).detach(), first)
    assert len(calls) == 4 * 3


def change_in_place(model, name):
    with torch.no_grad():
        for block in model.blocks:
            getattr(block.attn, name).mul_(-1)


def step_in_eval_mode(model, name):
    tables = [getattr(block.attn, name) for block in model.blocks]
    with torch.enable_grad():
        model(*inputs()).square().sum().backward()
    torch.optim.Adam(tables, lr=0.3, foreach=True).step()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("change", [change_in_place, step_in_eval_mode])
def test_cached_biases_follow_each_table(change, name):
    model = random_model(mediator_num=4)
    with torch.no_grad():
        before = model(*inputs())
    change(model, name)
    fresh = random_model(mediator_num=4)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        after = model(*inputs())
        assert torch.equal(after, fresh(*inputs()))
    assert (after - before).abs().max() > 1e-4


def test_cached_biases_follow_loaded_weights_and_precision():
    model, other = random_model(mediator_num=4), random_model(seed=1, mediator_num=4)
    with torch.no_grad():
        model(*inputs())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(*inputs()), other(*inputs()))
        x, t, y = inputs()
        double = model.double()(x.double(), t, y)
        match(double.float(), other(x, t, y))


# What a state dict tells


@pytest.mark.parametrize(
    "overrides",
    [
        {"mediator_num": 4},
        {"mediator_num": 9, "mediator_layers": 2},
        {"mediator_num": 4, "learn_sigma": False, "in_channels": 3, "patch_size": 4, "mlp_ratio": 2.0, "num_classes": 3},
        {"width": 384, "num_heads": 6},
        {"width": 96, "num_heads": 3},  # SiT-Ti/2's
        {"width": 192, "num_heads": 3},  # no registered model's: 64 a head
    ],
)
def test_config_is_inferred(overrides):
    with torch.device("meta"):
        model = create_model("SiT-S/2", **{**TINY, "depth": 3, **overrides})
    assert config_from_state(model.state_dict()) == model.config


def test_what_cannot_be_inferred():
    with pytest.raises(ValueError, match="16 wide: its weights do not tell the number of heads"):
        config_from_state(random_model().state_dict())
    state = random_model(mediator_num=4).state_dict()
    later = {key: value for key, value in state.items() if not key.startswith("blocks.0.attn.an_bias")}
    with pytest.raises(ValueError, match=r"mediators in blocks \[1, 2\]: a SiT has them in its first blocks"):
        config_from_state(later)
    with pytest.raises(ValueError, match="lack pos_embed"):
        config_from_state({key: value for key, value in state.items() if key != "pos_embed"})


def test_other_networks_are_no_sit():
    assert not is_sit_state(create_model("EDT-Ti/2").state_dict())
    assert not is_sit_state({"layer.weight": torch.zeros(1)})
    assert SiTConfig(depth=1, width=16, num_heads=2).mediator_depth == 0
