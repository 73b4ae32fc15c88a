"""EDT: the published numbers, the masked pass, guidance, and the cached position bias."""

import copy
import json
import shutil
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

import models.attention
from models import create_model
from models.attention import RelativePositionBias, fused_attention
from models.edt import EDT_CONFIGS
from models.macs import multiply_accumulates, trained_parameters
from models.registry import model_config
from tests.shared import GOLDEN, golden_network, match

TINY = {"widths": (16, 24, 32, 24, 16), "num_heads": 2, "input_size": 16, "num_classes": 10}
KEYS = json.loads((GOLDEN / "edt_state_dict_keys.json").read_text())


def golden_model(weights, name="EDT-S/2", amm=False):
    state, _ = golden_network(weights)
    model = create_model(name, **TINY, amm=amm).eval()
    model.load_state_dict(state)
    return model


def random_model(seed=0, **overrides):
    """Eval mode; no weight is zero, so that every part of the network shows in the output."""
    model = create_model("EDT-S/2", **{**TINY, **overrides}).eval()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
                parameter.copy_(torch.randn(parameter.shape, generator=draws) / max(fan_in, 4) ** 0.5)
    return model


def inputs(batch=2, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 16, 16, generator=draws)
    return x, torch.randint(0, 1000, (batch,), generator=draws), torch.randint(0, 11, (batch,), generator=draws)


# The published numbers


@pytest.mark.parametrize(
    "numbers, weights, name, amm",
    [
        ("edt_tiny_s_no_amm", "edt_tiny_s_no_amm", "EDT-S/2", False),
        ("edt_tiny_s_amm", "edt_tiny_s_no_amm", "EDT-S/2", "exp:7,10"),  # the same weights and inputs
        ("edt_tiny_xl_amm", "edt_tiny_xl_amm", "EDT-XL/2", "exp:23,25"),
    ],
)
def test_golden_forward(numbers, weights, name, amm):
    model = golden_model(weights, name, amm)
    _, data = golden_network(numbers)
    x, t, y = data["x"], data["t"], data["y"]
    with torch.no_grad():
        match(model(x, t, y), data["out"])
        if "out_cfg" in data:
            doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
            match(model.forward_with_cfg(*doubled, data["cfg_scale"].item()), data["out_cfg"])


@pytest.mark.parametrize(
    "numbers, weights, name, places",
    [("edt_tiny_s_masked", "edt_tiny_s_no_amm", "EDT-S/2", 2), ("edt_tiny_xl_masked", "edt_tiny_xl_amm", "EDT-XL/2", 3)],
)
def test_golden_masked_forward(numbers, weights, name, places):
    model = golden_model(weights, name)
    _, data = golden_network(weights)
    _, masked = golden_network(numbers)
    assert len(model.config.mask_places) == places
    keep = [masked[f"uniform_{i}"] >= masked[f"drop_probability_{i}"] for i in range(places)]
    for i, place in enumerate(model.config.mask_places):
        assert torch.equal(keep[i], masked[f"keep_mask_{i}"])
        assert keep[i].shape[1] == place.num_tokens
        assert place.low <= masked[f"drop_probability_{i}"] <= place.high
    with torch.no_grad():
        match(model(data["x"], data["t"], data["y"], keep), masked["out"])
        assert not torch.allclose(masked["out"], model(data["x"], data["t"], data["y"]), atol=1e-2)


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]


def test_fixed_tables_are_the_published_ones():
    """A golden forward would not notice: load_state_dict overwrites them."""
    state, _ = golden_network("edt_tiny_s_no_amm")
    fresh = create_model("EDT-S/2", **TINY)
    tables = {key: value for key, value in fresh.named_parameters() if key.endswith("pos_embed")}
    assert len(tables) == 5
    for key, table in tables.items():
        assert not table.requires_grad
        assert_close(table.data, state[key], rtol=0, atol=1e-6)


# Initialisation, sizes and mistakes


def test_a_fresh_network_predicts_zero():
    model = create_model("EDT-S/2", **TINY)
    with torch.no_grad():
        assert torch.equal(model(*inputs()), torch.zeros(2, 8, 16, 16))


def test_what_is_zero_at_the_start():
    model = create_model("EDT-S/2", **TINY)
    for name, parameter in model.named_parameters():
        zeroed = name.startswith("final_layer") or (name.startswith("blocks") and "adaLN" in name) or name.endswith(".bias")
        assert (parameter.count_nonzero() == 0) == zeroed, name


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"depths": (2, 2, 2, 3)}, "depths must be 5"),
        ({"depths": (2, 2, 0, 3, 3)}, "depths must be 5 positive"),
        ({"num_heads": (2, 2, 2, 2, 0)}, "num_heads"),
        ({"widths": (16, 24, 32, 24, 20)}, "equally wide"),
        ({"widths": (16, 20, 32, 24, 16)}, "equally wide"),
        ({"num_heads": 3}, "not divisible by the number of heads"),
        ({"widths": (18, 24, 32, 24, 18)}, "divisible by 4"),
        ({"input_size": 20}, "divisible by 8, got 20"),
        ({"input_size": 16, "patch_size": 8}, "divisible by 32"),
        ({"early_mask_block": 2}, "early_mask_block 2"),
        ({"early_mask_block": -1}, "early_mask_block -1"),
        ({"num_classes": 0}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"amm": "exp:7,12"}, "those that can have it are 0 to 11"),
        ({"amm": "exp:-1"}, "those that can have it are 0 to 11"),
        ({"hidden": 3, "depth": 1}, "no setting depth, hidden"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("EDT-S/2", **{**TINY, **overrides})


def test_unknown_name():
    with pytest.raises(ValueError, match="EDT-S/2"):
        create_model("EDT-S")


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 32, 32), (2, 4, 16, 8), (4, 16, 16)])
def test_wrong_input_shape(shape):
    model = create_model("EDT-S/2", **TINY)
    with pytest.raises(ValueError, match=r"takes latents of shape \(4, 16, 16\)"):
        model(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("early, tokens", [(None, []), (None, [64]), (None, [16, 64]), (None, [64, 64, 16]), (1, [64, 16])])
def test_wrong_masks(early, tokens):
    model = create_model("EDT-S/2", **TINY, early_mask_block=early)
    with pytest.raises(ValueError, match="this model takes keep masks of shapes"):
        model(*inputs(), [torch.ones(2, n, dtype=torch.bool) for n in tokens])


def test_registered_models_can_be_halved_twice():
    for config in EDT_CONFIGS.values():
        assert [stage.grid for stage in config.stages] == [config.input_size // config.patch_size // k for k in (1, 2, 4, 2, 1)]


# What the output depends on


@pytest.mark.parametrize("amm", [False, "exp:7,10"])
def test_batch_composition_does_not_matter(amm):
    model = random_model(amm=amm)
    x, t, y = inputs(5)
    with torch.no_grad():
        together = model(x, t, y)
        for k in range(5):
            assert_close(model(x[k : k + 1], t[k : k + 1], y[k : k + 1]), together[k : k + 1], rtol=1e-5, atol=1e-5)


def test_amm_acts_in_eval_mode_only_and_has_no_weights():
    plain, modulated = random_model(), random_model(amm="exp:7,10")
    assert plain.state_dict().keys() == modulated.state_dict().keys()
    with torch.no_grad():
        assert not torch.allclose(plain(*inputs()), modulated(*inputs()), atol=1e-3)
        in_training = modulated.train()(*inputs())
        assert_close(in_training, plain(*inputs()))
        assert not torch.allclose(modulated.eval()(*inputs()), in_training, atol=1e-3)


@pytest.mark.parametrize("early_mask_block", [None, 1])
def test_keeping_every_token_is_no_mask(early_mask_block):
    model = random_model(early_mask_block=early_mask_block)
    keep = [torch.ones(2, place.num_tokens, dtype=torch.bool) for place in model.config.mask_places]
    with torch.no_grad():
        assert_close(model(*inputs(), keep), model(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_mask_touches_its_own_samples_only(place):
    model = random_model(early_mask_block=1)
    keep = [torch.ones(2, p.num_tokens, dtype=torch.bool) for p in model.config.mask_places]
    keep[place][1, 3] = False
    with torch.no_grad():
        change = (model(*inputs(), keep) - model(*inputs())).abs().amax((1, 2, 3))
    assert change[0] == 0
    assert change[1] > 1e-3


@pytest.mark.parametrize("channels, guided", [(3, 3), (None, 4), (4, 4), (1, 1)])
def test_guided_channels(channels, guided):
    """None is all of the noise, never the variance."""
    model = random_model()
    x, t, y = inputs()
    labels = torch.cat([y, torch.full_like(y, 10)])
    ignored = torch.full_like(x, torch.nan)  # the first half of x feeds both
    with torch.no_grad():
        out = model.forward_with_cfg(torch.cat([x, ignored]), torch.cat([t, t]), labels, 2.5, channels)
        cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 10))
    expected = uncond + 2.5 * (cond - uncond)
    for half, own in zip(out.chunk(2), (cond, uncond), strict=True):
        match(half[:, :guided], expected[:, :guided])
        match(half[:, guided:], own[:, guided:])


@pytest.mark.parametrize("channels", [3, None])
def test_guidance_of_scale_1_is_the_conditional_output(channels):
    model = random_model()
    x, t, y = inputs()
    with torch.no_grad():
        labels = torch.cat([y, torch.full_like(y, 10)])
        out = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, 1.0, channels)
        match(out[:2], model(x, t, y))


def test_without_learned_variance():
    model = random_model(learn_sigma=False)
    with torch.no_grad():
        assert model(*inputs()).shape == (2, 4, 16, 16)


# Precision and kernels


@pytest.mark.parametrize("amm", [False, "exp:7,10"])
def test_bf16_is_near_fp32(amm):
    model = random_model(amm=amm)
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs())
    assert (rounded.float() - exact).norm() < 2e-2 * exact.norm()
    assert not torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("bias_shape", [None, (1, 1, 9, 9), (1, 3, 9, 9)])
def test_padded_heads_change_nothing(monkeypatch, bias_shape):
    draws = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 52, generator=draws)
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=draws)
    plain = fused_attention(q, k, v, bias)
    asked = []
    monkeypatch.setattr(models.attention, "_padded_head_dim", lambda dim, device: asked.append(dim) or 56)
    padded = fused_attention(q, k, v, bias)
    assert asked == [52]
    assert padded.shape == plain.shape
    assert_close(padded, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim, padded", [(52, 56), (56, 56), (1, 8)])
def test_head_dimensions_are_padded_on_cuda_only(head_dim, padded):
    assert models.attention._padded_head_dim(head_dim, torch.device("cuda")) == padded
    assert models.attention._padded_head_dim(head_dim, torch.device("cpu")) == head_dim


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks():
    model = random_model(amm="exp:1", depths=(1, 1, 1, 1, 1))
    with torch.no_grad():
        eager = model(*inputs())
        compiled = model.blocks[1]
        compiled.compile(dynamic=False)
        assert compiled._compiled_call_impl is not None
        match(model(*inputs()), eager)


# The cached position bias


@pytest.fixture
def expansions(monkeypatch):
    """Counts the calls of RelativePositionBias.forward."""
    count = Counter()
    forward = RelativePositionBias.forward

    def counted(self):
        count["calls"] += 1
        return forward(self)

    monkeypatch.setattr(RelativePositionBias, "forward", counted)
    return count


def without_cache(model, *args):
    """With gradients enabled the bias is expanded at every call."""
    with torch.enable_grad():
        return model(*args).detach()


def tables(model):
    return [block.attn.rel_pos_bias.relative_position_bias_table for block in model.blocks]


@pytest.mark.parametrize("amm", [False, "exp:7,10"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bias_is_expanded_once_for_sampling(expansions, amm, mode):
    model = random_model(amm=amm)
    with mode():
        first = model(*inputs())
        assert expansions["calls"] == 12
        assert torch.equal(model(*inputs()), first)
        assert expansions["calls"] == 12
    match(without_cache(model, *inputs()), first)
    assert expansions["calls"] == 24


def load(model):
    model.load_state_dict(random_model(seed=1).state_dict())


def assign(model):
    model.load_state_dict(random_model(seed=1).state_dict(), assign=True)


def change_in_place(model):
    with torch.no_grad():
        for table in tables(model):
            table.add_(torch.randn_like(table))


def change_through_data(model):
    """Leaves no trace in the version counter: the change of mode is what drops the cache."""
    model.train()
    for table in tables(model):
        table.data.add_(torch.randn_like(table))
    model.eval()


def train_a_step(model):
    optimizer = torch.optim.Adam(tables(model), lr=0.3)
    model.train()
    model(*inputs()).square().sum().backward()
    optimizer.step()
    model.eval()


def step_in_eval_mode(model):
    optimizer = torch.optim.Adam(tables(model), lr=0.3, foreach=True)
    with torch.enable_grad():
        model(*inputs()).square().sum().backward()
    optimizer.step()


def average(model):
    """As the EMA does."""
    other = random_model(seed=1)
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 0.5)


@pytest.mark.parametrize(
    "change", [load, assign, change_in_place, change_through_data, train_a_step, step_in_eval_mode, average]
)
@pytest.mark.parametrize("amm", [False, "exp:7,10"])
def test_cached_bias_follows_the_table(change, amm):
    torch.manual_seed(0)
    model = random_model(amm=amm)
    with torch.no_grad():
        before = model(*inputs())
    old_tables = [table.detach().clone() for table in tables(model)]
    change(model)
    assert all((new - old).abs().max() > 1e-2 for new, old in zip(tables(model), old_tables, strict=True))
    with torch.no_grad():
        after = model(*inputs())
    assert not torch.allclose(after, before, atol=1e-3)
    match(after, without_cache(model, *inputs()))


@pytest.mark.parametrize("amm", [False, "exp:7,10"])
def test_cached_bias_follows_the_precision(amm):
    model = random_model(amm=amm)
    x, t, y = inputs()
    with torch.no_grad():
        single = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, t, y)
            assert {block.attn.score_bias().dtype for block in model.blocks} == {torch.bfloat16}
        assert {block.attn.score_bias().dtype for block in model.blocks} == {torch.float32}
        match(model(x, t, y), single)
        fresh = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fresh(x, t, y), mixed)
        double = model.to(torch.float64)(x.double(), t, y)
        assert double.dtype == torch.float64
        match(double.float(), single)
        assert {block.attn.score_bias().dtype for block in model.blocks} == {torch.float64}
        match(model.to(torch.float32)(x, t, y), single)


def test_gradients_reach_every_table(expansions):
    """Also in eval mode and after sampling filled the cache."""
    model = random_model()
    with torch.no_grad():
        model(*inputs())
    model(*inputs()).square().sum().backward()
    assert all(table.grad.abs().max() > 0 for table in tables(model))
    assert expansions["calls"] == 24


def random_masks(number, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.rand(number, tokens, generator=draws) > 0.4 for tokens in (64, 16)]


def test_masks_belong_to_the_last_samples():
    model = random_model()
    x, t, y = torch.randn(3, 4, 16, 16), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        both = model(x, t, y, random_masks(2))
        match(both[:1], model(x[:1], t[:1], y[:1]))
        match(both[1:], model(x[1:], t[1:], y[1:], random_masks(2)))
        assert not torch.allclose(both[1:], model(x[1:], t[1:], y[1:]), atol=1e-3)
    with pytest.raises(ValueError, match="for 4 of 3 samples this model takes keep masks of shapes"):
        model(x, t, y, random_masks(4))


def test_amm_model_on_the_meta_device():
    """GMAC are counted there; a value read back from a tensor (once the matrix's maximum) has none to give."""
    with torch.device("meta"):
        model = create_model("EDT-S/2", amm=True).eval()
        assert model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize("depths, millions, gmac", [((6, 5, 4, 7, 6), 708.44, 51.83), ((6, 4, 4, 7, 7), 698.5, 53.44)])
def test_which_depths_the_published_figures_of_xl_fit(depths, millions, gmac):
    """The paper's figures are not those of the released code's depths, 6, 4, 4, 7, 7."""
    config = model_config("EDT-XL/2", depths=depths)
    assert trained_parameters(config) / 1e6 == pytest.approx(millions, abs=0.05)
    assert multiply_accumulates(config) / 1e9 == pytest.approx(gmac, abs=0.005)
