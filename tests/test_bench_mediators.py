"""The mediators' benchmark from end to end, on small sizes, and its plain formulation. Nothing here depends on real speed."""

import re

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import mediators
from benchmarks.networks import forward_call
from benchmarks.plain_loops import sample_with_two_calls
from benchmarks.reference import PlainMediatorAttention, with_plain_attention
from diffusion.transport import Sampler, create_transport
from models.macs import fresh_on_meta, multiply_accumulates
from tests.shared import golden_network
from tests.test_sit import inputs, random_model


@pytest.mark.parametrize("mediator_num", [1, 4, 9, 16])  # 9: pooling windows of the 8 x 8 grid overlap
def test_published_formulation_gives_the_same_output(mediator_num):
    model = random_model(mediator_num=mediator_num, mediator_layers=2)
    plain = with_plain_attention(model)
    assert [type(block.attn) is PlainMediatorAttention for block in plain.blocks] == [True, True, False]
    expected = forward_call(model, inputs())()
    assert expected.std() > 0.01
    assert_close(forward_call(plain, inputs())(), expected, rtol=1e-4, atol=1e-4)


def test_published_formulation_gives_the_published_numbers():
    state, data = golden_network("sit_tiny_mediator16")
    model = with_plain_attention(random_model(depth=12, mediator_num=16))
    model.load_state_dict(state)
    assert_close(forward_call(model, (data["x"], data["t"], data["y"]))(), data["out"], rtol=1e-4, atol=1e-4)


def test_floor_is_attention_of_every_token_to_itself():
    """With one token, softmax attention is proj(v) as well."""
    model = random_model(input_size=2)
    x, t, y = inputs()
    x = x[..., :2, :2]
    assert_close(forward_call(mediators.with_linears_only(model), (x, t, y))(), forward_call(model, (x, t, y))())


def test_floor_macs_are_those_of_its_products():
    config = mediators.config_of(64, None)
    model, inputs = fresh_on_meta(config), (torch.empty(1, 4, 8, 8), torch.empty(1), torch.empty(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        mediators.with_linears_only(model)(*(tensor.to("meta") for tensor in inputs))
    assert mediators.floor_macs(config) == counter.get_total_flops() // 2 < multiply_accumulates(config)


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_two_calls_give_the_same_sample(path):
    sampler = Sampler(create_transport(path))
    options = {"num_steps": 20, "diffusion_form": "sigma"}
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    once, twice = mediators.CountedNetwork(), mediators.CountedNetwork()
    [expected] = sampler.sample_sde(step_noise=mediators.no_noise(z), **options)(z, once)
    assert_close(sample_with_two_calls(sampler.sde(**options), z, twice), expected)
    assert (once.calls, twice.calls) == (20, 40)


def test_small_run_reports_every_comparison(capsys, monkeypatch):
    written = []
    monkeypatch.setattr(mediators, "write_section", lambda title, text: written.append((title, text)))
    mediators.main(["--image-sizes", "32", "64", "--mediators", "4", "--repeats", "1"])
    text = capsys.readouterr().out.rstrip("\n")
    assert written[0][0].startswith("benchmarks.mediators: SiT-S/2 on ") and written[0][1] == text
    for size in (32, 64):
        for name in ("plain", "floor", "M = 4", "M = 4, published"):
            assert re.search(rf"^\| {size}, {name} +\|", text, re.MULTILINE), text
    found = re.search(
        r"^- 64, M = 4: (\S+) times as fast as plain, (\S+) of the floor's speed, .*; (\S+) GMAC$", text, re.MULTILINE
    )
    assert float(found[1]) > 0 and float(found[2]) > 0
    assert float(found[3]) == pytest.approx(0.35, abs=0.02)  # 16 tokens do a sixteenth of 256 pixels' 5.5 GMAC
    assert re.search(r"^- Peak bytes per token, M = 4: \d+ at 32, \d+ at 64 ", text, re.MULTILINE), text
    found = re.search(r": 250 network calls, published 500; largest difference (\S+) of values", text)
    assert float(found[1]) < 1e-5


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--image-sizes", "100"], "divisible by 8, .* got 100"),
        (["--mediators", "5"], "--mediators 5 --image-sizes 256: .*square"),
    ],
)
def test_unfit_sizes_are_refused_before_anything_is_timed(flags, says, capsys):
    with pytest.raises(SystemExit):
        mediators.main(flags)
    assert re.search(says, capsys.readouterr().err)
