"""The plain formulations against numbers that are not ours, and against the fast paths."""

import numpy as np
import pytest
import timm.optim
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from benchmarks.networks import LEARNING_RATE, fresh_accelerator, random_inputs, randomized, training_batch, training_step
from benchmarks.plain_loops import ADAN_BETAS, PlainAdan, PlainEMA, PlainStep, plain_ddim, plain_pack, plain_write
from benchmarks.reference import PlainAttention, plain_network, with_plain_attention
from diffusion import create_diffusion
from models import create_model
from tests import test_dit, test_edt, test_mdt, test_sit
from tests.shared import golden_network, match

NETWORKS = [  # golden numbers, weights, model, settings
    ("edt_tiny_s_no_amm", "edt_tiny_s_no_amm", "EDT-S/2", test_edt.TINY),
    ("edt_tiny_s_amm", "edt_tiny_s_no_amm", "EDT-S/2", {**test_edt.TINY, "amm": "exp:7,10"}),
    ("edt_tiny_xl_amm", "edt_tiny_xl_amm", "EDT-XL/2", {**test_edt.TINY, "amm": "exp:23,25"}),
    ("dit_tiny", "dit_tiny", "DiT-S/2", test_dit.TINY),
    ("dit_tiny_amm28", "dit_tiny_amm28", "DiT-XL/2", {**test_dit.TINY, "amm": True}),
    ("mdtv2_tiny", "mdtv2_tiny", "MDTv2-S/2", test_mdt.TINY),
    ("sit_tiny", "sit_tiny", "SiT-S/2", test_sit.TINY),
    ("sit_tiny_mediator4", "sit_tiny_mediator4", "SiT-S/2", {**test_sit.TINY, "mediator_num": 4}),
    ("sit_tiny_mediator16", "sit_tiny_mediator16", "SiT-S/2", {**test_sit.TINY, "mediator_num": 16}),
]
TRAINED = [("EDT-Ti/2", {}), ("MDTv2-Ti/2", {}), ("DiT-Ti/2", {}), ("SiT-Ti/2", {"mediator_num": 9})]


def golden_plain(weights: str, name: str, settings: dict) -> nn.Module:
    model = create_model(name, **settings)
    model.load_state_dict(golden_network(weights)[0])
    return plain_network(model).eval()


# Networks


@pytest.mark.parametrize("numbers, weights, name, settings", NETWORKS, ids=[row[0] for row in NETWORKS])
def test_golden_forward(numbers, weights, name, settings):
    _, data = golden_network(numbers)
    with torch.no_grad():
        match(golden_plain(weights, name, settings)(data["x"], data["t"], data["y"]), data["out"])


@pytest.mark.parametrize(
    "numbers, weights, name",
    [("edt_tiny_s_masked", "edt_tiny_s_no_amm", "EDT-S/2"), ("edt_tiny_xl_masked", "edt_tiny_xl_amm", "EDT-XL/2")],
)
def test_golden_masked_forward_of_edt(numbers, weights, name):
    (_, data), (_, masked) = golden_network(weights), golden_network(numbers)
    plain = golden_plain(weights, name, test_edt.TINY)
    keep = [masked[f"keep_mask_{i}"] for i in range(len(plain.config.mask_places))]
    with torch.no_grad():
        match(plain(data["x"], data["t"], data["y"], keep), masked["out"])


def test_golden_masked_forward_of_mdt():
    (_, data), (_, masked) = golden_network("mdtv2_tiny"), golden_network("mdtv2_tiny_masked")
    plain = golden_plain("mdtv2_tiny", "MDTv2-S/2", test_mdt.TINY)
    kept = [plain.config.mask_places[0].kept(masked["token_order_noise"], masked["mask_ratio"].item())]
    with torch.no_grad():
        match(plain(data["x"], data["t"], data["y"], kept), masked["out"])


@pytest.mark.parametrize("name, settings", TRAINED)
def test_gradients_are_those_of_the_network(name, settings):
    """Also after a call in inference mode, whose tensors autograd would not take."""
    model = randomized(create_model(name, **settings)).train()
    plain, inputs = plain_network(model).train(), random_inputs(model.config, 3, torch.device("cpu"))
    with torch.inference_mode():
        plain(*inputs)
    for network in (model, plain):
        network(*inputs).square().mean().backward()
    for (key, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            assert own is not other
            assert_close(other.grad, own.grad, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_only_the_attention_is_plain():
    model = randomized(create_model("EDT-Ti/2", amm="exp:4"))
    plain = with_plain_attention(model)
    assert all(type(block.attn) is PlainAttention for block in plain.blocks)
    assert all(type(block.attn) is not PlainAttention for block in model.blocks)


# Optimizer, average and training step


def test_adan_is_timms():
    draws = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=draws), torch.randn(7, generator=draws)]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    plain = PlainAdan(ours, 1e-2)
    reference = timm.optim.Adan(theirs, lr=1e-2, betas=ADAN_BETAS, foreach=False)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=draws)
            b.grad = a.grad.clone()
        plain.step()
        reference.step()
        plain.zero_grad()
        assert ours[0].grad is None
        assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(ours[0], start[0], atol=1e-2)


def test_average_is_exponential():
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = PlainEMA([parameter], 0.75)
    for value in (5.0, 9.0):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
    assert_close(ema.average[0], torch.tensor([0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9]))


@pytest.mark.parametrize("name, settings", TRAINED)
def test_a_step_moves_the_weights_as_the_training_scripts_do(name, settings):
    """Two passes apart against both together, loops against timm's and torch's optimizers: losses, weights and averages."""
    network, b = randomized(create_model(name, **settings)), 3
    masked = hasattr(network.config, "mask_places")
    optimizer = "adan" if masked else "adamw"
    batch = training_batch(network.config, b, masked=masked)
    plain = PlainStep(plain_network(network), optimizer)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    step = training_step(network, b, fresh_accelerator("fp32"), optimizer)
    outcome = step(0, batch, LEARNING_RATE)
    assert_close(plain(batch).sum(), outcome.sums[0], rtol=1e-5, atol=0)
    moved = 0
    for old, own, other in zip(before, network.parameters(), plain.network.parameters(), strict=True):
        if own.requires_grad:
            moved += int(not torch.equal(own, old))
            assert_close(other - old, own - old, rtol=0, atol=0.2 * LEARNING_RATE)
    assert moved > 10


# Sampling


def test_ddim_is_the_diffusions():
    model = randomized(create_model("EDT-Ti/2")).eval()
    diffusion, draws = create_diffusion("7"), torch.Generator().manual_seed(0)
    noise, y = torch.randn(2, 3, 16, 16, generator=draws), torch.tensor([1, 4])
    with torch.no_grad():
        expected = diffusion.ddim_sample_loop(model, noise.shape, noise, model_kwargs={"y": y})
    found = plain_ddim(plain_network(model).eval(), noise, y, diffusion.timestep_map)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, noise, atol=0.1)


def test_images_are_written_and_packed(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    plain_write(images[:3], tmp_path / "png", 0)
    plain_write(images[3:], tmp_path / "png", 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000004.png")), images[4])
    plain_pack(tmp_path / "png", 5, tmp_path / "all.npz")
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], images)
