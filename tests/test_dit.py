"""DiT: the published numbers and sizes, AMM, and what a state dict tells."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from benchmarks.reference import with_plain_attention
from models import create_model, model_names
from models.dit import config_from_state, is_dit_state
from models.layers import compile_blocks
from models.macs import multiply_accumulates
from models.registry import PUBLISHED, model_config
from tests.shared import GOLDEN, golden_network, match, perturb

TINY = {"width": 16, "num_heads": 2, "input_size": 16, "num_classes": 10}
KEYS = json.loads((GOLDEN / "dit_state_dict_keys.json").read_text())


def random_model(seed=0, **overrides):
    """Eval mode; no weight is zero, so that every part shows in the output."""
    torch.manual_seed(seed)
    return perturb(create_model("DiT-S/2", **{**TINY, "depth": 3, **overrides}), 0.2).eval()


def inputs(batch=2, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 16, 16, generator=draws)
    return x, torch.randint(0, 1000, (batch,), generator=draws), torch.randint(0, 11, (batch,), generator=draws)


# The published numbers


@pytest.mark.parametrize("numbers, name, amm", [("dit_tiny", "DiT-S/2", False), ("dit_tiny_amm28", "DiT-XL/2", True)])
def test_golden_forward(numbers, name, amm):
    """amm=True: the published placement in the 28 blocks of XL."""
    state, data = golden_network(numbers)
    model = create_model(name, **TINY, amm=amm).eval()
    model.load_state_dict(state)
    x, t, y = data["x"], data["t"], data["y"]
    with torch.no_grad():
        match(model(x, t, y), data["out"])
        assert ("out_cfg" in data) == (not amm)
        if "out_cfg" in data:
            doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
            match(model.forward_with_cfg(*doubled, data["cfg_scale"].item()), data["out_cfg"])
        else:
            plain = create_model(name, **TINY).eval()
            plain.load_state_dict(state)
            assert (plain(x, t, y) - data["out"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_is_the_published_one(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == KEYS[name]
    assert is_dit_state(state)
    assert config_from_state(state) == model_config(name)


def test_every_published_row_is_there():
    assert set(KEYS) == {"DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"}
    registered = {name for name in model_names() if name.startswith("DiT")}
    assert {label for label in PUBLISHED if label.startswith("DiT")} == registered - {"DiT-Ti/2"}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("DiT")])
def test_published_sizes(name):
    """As with SiT, the paper seems to count a little more than products and convolutions: at most 0.3 %. Its figures have two
    digits, rounded or cut."""
    config, published = model_config(name), PUBLISHED[name]
    assert -0.01 < published.gmac - multiply_accumulates(config) / 1e9 < 0.003 * published.gmac + 0.005
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(name).parameters() if p.requires_grad)
    assert round(parameters / 1e6) == published.params_millions


def test_the_fixed_table_is_the_published_one():
    """A golden forward would not notice: load_state_dict overwrites it."""
    state, _ = golden_network("dit_tiny")
    table = create_model("DiT-S/2", **TINY).pos_embed
    assert not table.requires_grad
    assert_close(table.data, state["pos_embed"], rtol=0, atol=1e-6)


def test_a_fresh_network_predicts_zero():
    with torch.no_grad():
        assert torch.equal(create_model("DiT-S/2", **TINY)(*inputs()), torch.zeros(2, 8, 16, 16))


# AMM


@pytest.mark.parametrize("name, blocks", [("DiT-XL/2", (15, 17, 19, 22, 24)), ("DiT-S/2", (8, 10))])
def test_published_placements(name, blocks):
    with torch.device("meta"):
        model = create_model(name, amm=True)
    assert {i: block.attn.amm for i, block in enumerate(model.blocks) if block.attn.amm} == dict.fromkeys(blocks, "exp")


def test_no_placement_is_published_for_the_others():
    for name in ("DiT-B/2", "DiT-L/2", "DiT-XL/4"):
        with pytest.raises(ValueError, match=f"no AMM placement is published for {name}"):
            create_model(name, amm=True)


@pytest.mark.parametrize("amm", ["exp:0", "cos:1,2"])
def test_amm_acts_in_eval_mode_only_and_has_no_weights(amm):
    plain, modulated = random_model(), random_model(amm=amm)
    assert plain.state_dict().keys() == modulated.state_dict().keys()
    with torch.no_grad():
        out = modulated(*inputs())
        assert not torch.allclose(plain(*inputs()), out, atol=1e-3)
        match(with_plain_attention(modulated)(*inputs()), out)
        assert torch.equal(modulated.train()(*inputs()), plain(*inputs()))
        assert torch.equal(modulated.eval()(*inputs()), out)


# Mistakes


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_heads": 3}, "16 is not divisible by the number of heads 3"),
        ({"width": 18}, "divisible by 4"),
        ({"input_size": 15}, "divisible by the patch side 2, got 15"),
        ({"depth": 0}, "depth must be positive"),
        ({"amm": "exp:12"}, "those that can have it are 0 to 11"),
        ({"mediator_num": 4}, "DiT-S/2 has no setting mediator_num"),
        ({"decode_layer": 4}, "DiT-S/2 has no setting decode_layer"),
        ({"keep_sigma": True}, "DiT-S/2 has no setting keep_sigma"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("DiT-S/2", **{**TINY, **overrides})


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 32, 32), (2, 4, 16, 8), (4, 16, 16)])
def test_wrong_input_shape(shape):
    with pytest.raises(ValueError, match=r"takes latents of shape \(4, 16, 16\)"):
        random_model()(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


# Invariances, gradients, precision


@pytest.mark.parametrize("amm", [False, "exp:1"])
def test_batch_composition_does_not_matter(amm):
    model = random_model(amm=amm).double()
    x, t, y = inputs(5)
    with torch.no_grad():
        together = model(x.double(), t, y)
        for k in range(5):
            alone = model(x[k : k + 1].double(), t[k : k + 1], y[k : k + 1])
            assert_close(alone, together[k : k + 1], rtol=1e-11, atol=1e-11)


def test_a_sit_of_all_channels_is_a_dit():
    dit = random_model()
    sit = create_model("SiT-S/2", **TINY, depth=3, keep_sigma=True).eval()
    sit.load_state_dict(dit.state_dict())
    with torch.no_grad():
        assert torch.equal(sit(*inputs()), dit(*inputs()))


@pytest.mark.parametrize("learn_sigma, channels", [(True, 8), (False, 4)])
def test_output_channels(learn_sigma, channels):
    model = random_model(learn_sigma=learn_sigma)
    with torch.no_grad():
        assert model(*inputs()).shape == (2, model.config.out_channels, 16, 16) == (2, channels, 16, 16)


def test_gradients_reach_every_weight():
    model = random_model()
    model(*inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("amm", [False, "exp:1"])
def test_bf16_is_near_fp32(amm):
    model = random_model(amm=amm)
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs())
        match(model(*inputs()), exact)
    assert 0 < (rounded.float() - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks():
    model = random_model(depth=1)
    with torch.no_grad():
        eager = model(*inputs())
        compile_blocks(model)
        match(model(*inputs()), eager)


# What a state dict tells


@pytest.mark.parametrize(
    "overrides",
    [
        {"width": 384, "num_heads": 6, "input_size": 64},
        {"width": 384, "num_heads": 6, "patch_size": 4, "learn_sigma": False, "in_channels": 3, "mlp_ratio": 2.0},
        {"width": 1152, "num_heads": 16, "depth": 1, "num_classes": 3},  # XL's: 72 a head
        {"width": 96, "num_heads": 3},  # DiT-Ti/2's
        {"width": 192, "num_heads": 3},  # no registered model's: 64 a head
    ],
)
def test_config_is_inferred(overrides):
    with torch.device("meta"):
        model = create_model("DiT-S/2", **{**TINY, "depth": 3, **overrides})
    assert config_from_state(model.state_dict()) == model.config


def test_what_cannot_be_inferred():
    with pytest.raises(ValueError, match="16 wide: its weights do not tell the number of heads"):
        config_from_state(random_model().state_dict())
    state = random_model().state_dict()
    del state["x_embedder.proj.weight"]
    with pytest.raises(ValueError, match=r"lack x_embedder\.proj\.weight"):
        config_from_state(state)


@pytest.mark.parametrize("name, settings", [("EDT-S/2", {}), ("MDTv2-S/2", {}), ("SiT-S/2", {"mediator_num": 4})])
def test_other_networks_are_no_dit(name, settings):
    with torch.device("meta"):
        assert not is_dit_state(create_model(name, **settings).state_dict())
