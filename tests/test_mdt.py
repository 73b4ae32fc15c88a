"""MDTv2: the published numbers, the masked pass, guidance, and what a state dict tells."""

import functools
import json

import pytest
import torch
from torch.testing import assert_close

from models import create_model
from models.layers import compile_blocks, sincos_table
from models.macs import multiply_accumulates
from models.mdt import MDT_CONFIGS, TokenSubset, config_from_state, is_mdt_state
from models.registry import PUBLISHED, model_config
from tests.mdt_networks import TINY, inputs, random_model, some_tokens
from tests.shared import GOLDEN, golden_network, match

KEYS = json.loads((GOLDEN / "mdt_state_dict_keys.json").read_text())


# The published numbers


def golden_model():
    state, data = golden_network("mdtv2_tiny")
    model = create_model("MDTv2-S/2", **TINY).eval()
    model.load_state_dict(state)
    return model, data


def test_golden_forward():
    model, data = golden_model()
    x, t, y = data["x"], data["t"], data["y"]
    doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
    with torch.no_grad():
        match(model(x, t, y), data["out"])
        match(model.forward_with_cfg(*doubled, data["cfg_scale"].item()), data["out_cfg"])
        model.cfg_power = 0
        assert not torch.allclose(model.forward_with_cfg(*doubled, data["cfg_scale"].item()), data["out_cfg"], atol=1e-2)


def test_golden_masked_forward():
    model, data = golden_model()
    _, masked = golden_network("mdtv2_tiny_masked")
    (place,) = model.config.mask_places
    assert (place.num_tokens, place.low, place.high) == (64, 0.3, 0.5)
    kept = [place.kept(masked["token_order_noise"], masked["mask_ratio"].item())]
    with torch.no_grad():
        match(model(data["x"], data["t"], data["y"], kept), masked["out"])
        assert not torch.allclose(masked["out"], model(data["x"], data["t"], data["y"]), atol=1e-2)


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_is_the_published_one(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == KEYS[name]
    assert is_mdt_state(state)
    assert config_from_state(state) == model_config(name)


def test_every_published_row_is_there():
    assert set(KEYS) == set(MDT_CONFIGS) - {"MDTv2-Ti/2"}
    assert {label for label in PUBLISHED if label.startswith("MDT")} <= set(MDT_CONFIGS)


@pytest.mark.parametrize("decode_layer", [4, 6])
@pytest.mark.parametrize("size", ["S", "B", "XL"])
def test_work_beyond_a_dit(size, decode_layer):
    """The skips of all blocks but the encoder-in ones: a 2 D -> D product for each token."""
    config = model_config(f"MDTv2-{size}/2", decode_layer=decode_layer)
    skips = (config.depth + decode_layer) // 2 * config.grid**2 * 2 * config.width**2
    assert multiply_accumulates(config) - multiply_accumulates(model_config(f"DiT-{size}/2")) == skips


# Initialisation


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("MDTv2-S/2", input_size=16)
    for table in (model.pos_embed, model.decoder_pos_embed):
        assert table.requires_grad and torch.equal(table.data, sincos_table(384, 8))
    state, _ = golden_network("mdtv2_tiny")
    buffer = "en_inblocks.0.attn.rel_pos_bias.relative_position_index"
    assert torch.equal(model.state_dict()[buffer], state[buffer])  # a golden forward would not notice: it is loaded
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2) and model.mask_token.shape == (1, 1, 384)
    for block in [*model.blocks, *model.sideblocks]:
        table = block.attn.rel_pos_bias.relative_position_bias_table
        assert table.shape == (15**2 + 3, 6) and table.std().item() == pytest.approx(0.02, rel=0.1)
        assert not block.adaLN_modulation[1].weight.any() and not block.adaLN_modulation[1].bias.any()
    for block in [*model.en_outblocks, *model.de_blocks]:
        # Xavier-uniform: within sqrt(6 / (2 D + D))
        assert block.skip_linear.weight.abs().max().item() == pytest.approx((6 / (3 * 384)) ** 0.5, rel=1e-3)
        assert not block.skip_linear.bias.any()


def test_a_fresh_network_predicts_zero():
    model = create_model("MDTv2-S/2", **TINY)
    with torch.no_grad():
        for kept in (None, [some_tokens()]):
            assert torch.equal(model(*inputs(), kept), torch.zeros(2, 8, 16, 16))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"decode_layer": 0}, "even number of the 12 blocks to the encoder, got 0"),
        ({"decode_layer": 5}, "even number of the 12 blocks to the encoder, got 5"),
        ({"decode_layer": 12}, "even number of the 12 blocks to the encoder, got 12"),
        ({"decode_layer": -2}, "even number of the 12 blocks to the encoder, got -2"),
        ({"num_heads": 3}, "16 is not divisible by the number of heads 3"),
        ({"input_size": 15}, "divisible by the patch side 2, got 15"),
        ({"mediator_num": 4}, "MDTv2-S/2 has no setting mediator_num"),
        ({"amm": "exp:12"}, "those that can have it are 0 to 11"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("MDTv2-S/2", **{**TINY, **overrides})


# The masked pass


@pytest.mark.parametrize("ratio, number", [(0, 64), (0.3, 44), (0.5, 32), (0.49, 32)])
def test_kept_tokens_are_those_of_the_smallest_draws(ratio, number):
    uniforms = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    kept = TokenSubset(64, 0.3, 0.5).kept(uniforms, ratio)
    assert kept.dtype == torch.int64 and kept.shape == (3, number) and (kept.diff(dim=1) > 0).all()
    for sample, draws in zip(kept.tolist(), uniforms.tolist(), strict=True):
        assert set(sample) == set(sorted(range(64), key=draws.__getitem__)[:number])


def test_the_order_of_the_kept_tokens_does_not_matter():
    model, kept = random_model().double(), some_tokens()
    x, t, y = inputs()
    order = torch.randperm(kept.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert_close(model(x.double(), t, y, [kept[:, order]]), model(x.double(), t, y, [kept]), rtol=1e-9, atol=1e-9)


def test_keeping_every_token_is_no_mask():
    model, every = random_model().double(), some_tokens(ratio=0)
    x, t, y = inputs()
    with torch.no_grad():
        assert_close(model(x.double(), t, y, [every]), model(x.double(), t, y), rtol=1e-9, atol=1e-9)


def test_samples_do_not_touch_one_another():
    """Whole ones first, then masked ones, each with tokens of its own."""
    model, kept = random_model().double(), some_tokens(3)
    x, t, y = inputs(5)
    x = x.double()
    with torch.no_grad():
        together = model(x, t, y, [kept])
        for k in range(5):
            own = [kept[k - 2 : k - 1]] if k >= 2 else None
            assert_close(model(x[k : k + 1], t[k : k + 1], y[k : k + 1], own), together[k : k + 1], rtol=1e-9, atol=1e-9)
        assert (model(x, t, y) - together)[2:].abs().amax((1, 2, 3)).min() > 1e-2


def test_the_encoder_does_not_see_dropped_patches():
    """They reach the output through the decoder's skips, as published."""
    model, kept, seen = random_model(), some_tokens(1), []
    model.en_outblocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    x, t, y = inputs(1)
    dropped = next(i for i in range(64) if i not in kept[0])
    changed = [x.clone(), x.clone()]
    for image, token in zip(changed, (dropped, kept[0, 0].item()), strict=True):
        row, column = 2 * (token // 8), 2 * (token % 8)
        image[:, :, row : row + 2, column : column + 2] += 1
    with torch.no_grad():
        out, without_dropped, without_kept = (model(image, t, y, [kept]) for image in (x, *changed))
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2], atol=1e-2)
    assert (out - without_dropped).abs().max() > 1e-2 and (out - without_kept).abs().max() > 1e-2


@pytest.mark.parametrize(
    "kept, message",
    [
        ([], "takes one tensor of kept tokens, got 0"),
        ([torch.arange(8)[None]] * 2, "takes one tensor of kept tokens, got 2"),
        ([torch.arange(8)], r"int64 \(M, K\).* got torch.int64 \(8,\)"),
        ([torch.arange(8).expand(3, 8)], r"2 samples of 64 tokens .* got torch.int64 \(3, 8\)"),
        ([torch.zeros(2, 65, dtype=torch.int64)], r"got torch.int64 \(2, 65\)"),
        ([torch.zeros(2, 0, dtype=torch.int64)], r"got torch.int64 \(2, 0\)"),
        ([torch.ones(2, 64, dtype=torch.bool)], r"got torch.bool \(2, 64\)"),  # an EDT's mask
    ],
)
def test_wrong_tokens(kept, message):
    with pytest.raises(ValueError, match=message):
        random_model()(*inputs(), kept)


def test_what_the_masked_pass_alone_uses():
    model = random_model().train()
    alone = {"mask_token", *(name for name, _ in model.named_parameters() if name.startswith("sideblocks"))}
    model(*inputs()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == alone
    model(*inputs(), [some_tokens()]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert {name for name, p in model.without_masked_pass().named_parameters() if not p.requires_grad} == alone


# AMM


def test_published_placement():
    with torch.device("meta"):
        model = create_model("MDTv2-S/2", amm=True)
    assert {i: block.attn.amm for i, block in enumerate(model.blocks) if block.attn.amm} == {8: "exp"}
    assert model.de_blocks[0].attn.amm == "exp"  # after 4 + 4 blocks
    with pytest.raises(ValueError, match="no AMM placement is published for MDTv2-B/2"):
        create_model("MDTv2-B/2", amm=True)


@pytest.mark.parametrize("amm", ["exp:0,3,5", "cos:2"])
def test_amm_acts_in_eval_mode_only_and_has_no_weights(amm):
    plain, modulated = random_model(), random_model(amm=amm)
    assert plain.state_dict().keys() == modulated.state_dict().keys()
    with torch.no_grad():
        out = modulated(*inputs())
        assert not torch.allclose(plain(*inputs()), out, atol=1e-2)
        modulated.train()
        for kept in (None, [some_tokens()]):
            assert torch.equal(modulated(*inputs(), kept), plain(*inputs(), kept))
        assert torch.equal(modulated.eval()(*inputs()), out)
    assert modulated.sideblocks[0].attn.amm is None


@pytest.mark.parametrize("block", range(6))
def test_amm_goes_not_with_the_masked_pass(block):
    """In the encoder it needs all tokens; in the decoder too it belongs to sampling."""
    model = random_model(amm=f"exp:{block}")
    with torch.no_grad(), pytest.raises(ValueError, match=r"AMM is active: a masked pass .* train mode"):
        model(*inputs(), [some_tokens()])


# Guidance


@pytest.mark.parametrize("power", [0, 1, 4])
@pytest.mark.parametrize("channels, guided", [(3, 3), (None, 4)])
def test_guidance_grows_with_a_cosine_of_a_power(power, channels, guided):
    """Each sample by its own time; 0 is plain guidance."""
    model = random_model()
    model.cfg_power = power
    x, _, y = inputs(4)
    t = torch.tensor([0, 250, 500, 999])
    doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 10)])
    with torch.no_grad():
        out = model.forward_with_cfg(*doubled, 3.0, channels)
        cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 10))
    angle = torch.pi * (1 - t.double() / 1000) ** power
    scale = (1 + 2 * (1 - angle.cos()) / 2).float().view(-1, 1, 1, 1)
    assert scale.flatten().tolist() == pytest.approx(
        {0: [3, 3, 3, 3], 1: [3, 2.7071, 2, 1], 4: [3, 1.4543, 1.0193, 1]}[power], abs=1e-3
    )
    expected = uncond + scale * (cond - uncond)
    for half, own in zip(out.chunk(2), (cond, uncond), strict=True):
        match(half[:, :guided], expected[:, :guided])
        assert torch.equal(half[:, guided:], own[:, guided:])


def test_guidance_in_the_times_of_a_transport():
    scale = random_model().guidance_scale(4.0, torch.tensor([0.0, 0.5, 1.0]))
    assert_close(scale.flatten(), torch.full((3,), 4.0), rtol=1e-3, atol=0)


# Precision, compilation, caches


@pytest.mark.parametrize("kept", [None, [some_tokens(1)]])
def test_bf16_is_near_fp32(kept):
    model = random_model()
    with torch.no_grad():
        exact = model(*inputs(), kept)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*inputs(), kept)
        match(model(*inputs(), kept), exact)
    assert 0 < (rounded.float() - exact).norm() < 5e-2 * exact.norm()


def test_compiled_blocks_take_any_number_of_tokens(monkeypatch):
    """One more compilation at the second number of kept tokens, none after that. Without generating code, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters
    model, graphs = random_model(depth=3, decode_layer=1), []
    choices = [None, *([some_tokens(1, ratio)] for ratio in (0.3, 0.45, 0.37, 0.5))]
    eager = [model(*inputs(), kept) for kept in choices]
    compile_blocks(model)
    for kept, expected in zip(choices, eager, strict=True):
        match(model(*inputs(), kept), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 3 and len(set(graphs[2:])) == 1 and not counters["graph_break"]


def test_cached_biases_follow_each_table():
    model = random_model()
    with torch.no_grad():
        before = model(*inputs(), [some_tokens(1)])
        for block in [*model.blocks, *model.sideblocks]:
            model(*inputs(), [some_tokens(1)])
            block.attn.rel_pos_bias.relative_position_bias_table.mul_(-1)
        fresh = random_model()
        fresh.load_state_dict(model.state_dict())
        after = model(*inputs(), [some_tokens(1)])
        assert torch.equal(after, fresh(*inputs(), [some_tokens(1)]))
    assert (after - before).abs().max() > 1e-2


# What a state dict tells


@pytest.mark.parametrize(
    "overrides",
    [
        {"decode_layer": 6, "depth": 12},
        {"decode_layer": 4, "depth": 12, "num_heads": 4},
        {"input_size": 32, "num_classes": 3, "in_channels": 3},
        {"patch_size": 4, "learn_sigma": False, "mlp_ratio": 2.0},
    ],
)
def test_config_is_inferred(overrides):
    with torch.device("meta"):
        model = create_model("MDTv2-S/2", **{**TINY, "depth": 6, "decode_layer": 2, **overrides})
    assert config_from_state(model.state_dict()) == model.config


def test_what_cannot_be_inferred():
    state = random_model().state_dict()

    def without(part):
        return {key: value for key, value in state.items() if part not in key}

    with pytest.raises(ValueError, match="lack pos_embed"):
        config_from_state({key: value for key, value in state.items() if key != "pos_embed"})
    with pytest.raises(ValueError, match=r"lack the table of en_inblocks\.0"):
        config_from_state(without("en_inblocks.0.attn.rel_pos_bias"))
    with pytest.raises(ValueError, match="as many encoder-in as encoder-out blocks, here they are 2 and 1"):
        config_from_state(without("en_outblocks.1."))
    with torch.device("meta"):
        assert not any(is_mdt_state(create_model(name).state_dict()) for name in ("DiT-S/2", "EDT-S/2", "SiT-S/2"))
