"""What a network is given to look into it: the right images, noised as in training."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from data.codec import PixelCodec, load_codec
from diffusion.transport.paths import PATHS
from models.checkpoints import build_model, describe, read_checkpoint
from models.inference import prepare
from runtime.cli import ArgumentParser
from sampling.generate import Guidance, generate
from sampling.preview import quick_sampler
from sampling.probes import Probe, add_probe_arguments, make_probe, noised
from tests import edt_checkpoints, mdt_networks, sit_checkpoints

CODEC = PixelCodec(torch.device("cpu"))


def flags(*argv) -> argparse.Namespace:
    parser = ArgumentParser("test")
    add_probe_arguments(parser)
    return parser.parse_args(list(map(str, argv)))


@pytest.fixture(scope="module")
def edt(tmp_path_factory):
    checkpoint = read_checkpoint(edt_checkpoints.random_checkpoint(tmp_path_factory.mktemp("edt") / "edt.pt"))
    return checkpoint, prepare(build_model(checkpoint))


def made(edt, *argv) -> Probe:
    return make_probe(flags(*argv), *edt, CODEC)


@pytest.fixture
def ten(tmp_path) -> Path:
    """Ten grey images of 16 pixels, brighter by one from one to the next, in two classes."""
    for i in range(10):
        path = tmp_path / "ten" / str(i // 5) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i,) * 3).save(path)
    return tmp_path / "ten"


def test_images_of_a_folder_are_spread_evenly(edt, ten):
    probe = made(edt, "--data", ten, "--num-images", 4)
    assert probe.images.shape == (4, 16, 16, 3) and probe.images[:, 0, 0, 0].tolist() == [0, 2, 5, 7]
    assert probe.labels.tolist() == [0, 0, 1, 1]
    assert_close(probe.latents[3], torch.full((3, 16, 16), 7 / 127.5 - 1))


def test_images_of_an_npz_with_and_without_labels(edt, tmp_path):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "labelled.npz", arr_0=images, arr_1=np.arange(6))
    np.savez(tmp_path / "plain.npz", arr_0=images)
    probe = made(edt, "--data", tmp_path / "labelled.npz", "--num-images", 2)
    assert probe.images[:, 0, 0, 0].tolist() == [0, 3] and probe.labels.tolist() == [0, 3]
    assert made(edt, "--data", tmp_path / "plain.npz", "--num-images", 2).labels.tolist() == [10, 10]  # the null class


def test_fresh_images_are_the_network_s_own(edt):
    checkpoint, model = edt
    probe = made(edt, "--num-images", 3, "--num-sampling-steps", 4, "--seed", 5)
    sampler = quick_sampler(checkpoint.objective, 4)
    [batch] = generate(model, sampler, CODEC, range(3), labels=lambda i: i, seed=5)
    assert np.array_equal(probe.images, batch.images.numpy()) and probe.labels.tolist() == [0, 1, 2]
    assert probe.latents.is_floating_point() and probe.latents.shape == (3, 3, 16, 16)
    again = made(edt, "--num-images", 3, "--num-sampling-steps", 4, "--seed", 5)
    assert torch.equal(probe.latents, again.latents)


def test_guidance_of_a_transport_has_no_power(tmp_path):
    """An MDTv2 trained as a transport was guided by the power-cosine of Gaussian diffusion's noise."""
    objective = {"name": "transport", "path_type": "Linear", "prediction": "velocity"}
    model = mdt_networks.random_model(in_channels=3)
    config = describe("MDTv2-S/2", model.config, codec={"name": "pixels", "scale": 1.0}, class_names=(), objective=objective)
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "config": config, "step": 1}, tmp_path / "mdt.pt")
    checkpoint = read_checkpoint(tmp_path / "mdt.pt")
    network, sampler = prepare(build_model(checkpoint)), quick_sampler(checkpoint.objective, 4)
    probe = made((checkpoint, network), "--num-images", 2, "--num-sampling-steps", 4, "--cfg-scale", 3)
    for power in (0.0, 4.0):
        guidance = Guidance(3.0, power=power)
        [batch] = generate(network, sampler, CODEC, range(2), labels=lambda i: i, seed=0, guidance=guidance)
        assert np.array_equal(probe.images, batch.images.numpy()) == (power == 0)


def test_data_that_do_not_fit(edt, ten, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "outside.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8), arr_1=np.arange(9) + 5)
    np.savez(tmp_path / "null.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8), arr_1=np.arange(8) + 3)
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8), arr_1=np.arange(3))
    for argv, message in (
        (("--data", tmp_path / "large.npz"), r"large.npz: arr_0 is uint8 \(9, 32, 32, 3\); the checkpoint takes .*16, 16, 3"),
        (("--data", tmp_path / "outside.npz"), "label 10, but .* has classes 0 to 9"),
        (("--data", tmp_path / "null.npz"), "label 10, but .* has classes 0 to 9"),  # not "no label", if it is stated
        (("--data", tmp_path / "few.npz"), "not one label for each of 9 images"),
        (("--data", ten, "--num-images", 11), "holds 10 images, fewer than --num-images 11"),
        (("--data", ten, "--cfg-scale", 2), "--cfg-scale 2.0 means nothing to images of --data"),
        (("--data", tmp_path / "nowhere"), "nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            made(edt, *argv)


def test_a_vae_s_images_are_encoded_from_its_posterior(edt, tiny_vae, image_folder):
    """By a draw that depends on the seed, as in training."""
    codec = load_codec(str(tiny_vae))
    checkpoint, model = edt
    probes = [
        make_probe(flags("--data", image_folder, "--num-images", 2, "--seed", seed), checkpoint, model, codec)
        for seed in (0, 0, 1)
    ]
    assert probes[0].latents.shape == (2, 4, 16, 16) and probes[0].images.shape == (2, 128, 128, 3)
    assert torch.equal(probes[0].latents, probes[1].latents) and not torch.equal(probes[0].latents, probes[2].latents)


PROBE = Probe(np.zeros((2, 16, 16, 3), np.uint8), torch.full((2, 3, 16, 16), 0.5), torch.tensor([1, 2]))


@pytest.mark.parametrize("level, t", [(0.0, 0), (0.7, 700), (1.0, 999)])
def test_noise_of_gaussian_diffusion(edt, level, t):
    """With betas from 1e-4 to 0.02, the signal that is left is the root of the product of 1 - beta."""
    x, times = noised(edt[0], PROBE, level, seed=3)
    assert times.tolist() == [t, t]
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    noise = (x - kept**0.5 * 0.5) / (1 - kept) ** 0.5
    assert abs(float(noise.std()) - 1) < 0.06 and abs(float(noise.mean())) < 0.06
    other, _ = noised(edt[0], PROBE, min(level + 0.1, 0.9), seed=3)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[round(1000 * min(level + 0.1, 0.9))]
    assert_close(noise, (other - kept**0.5 * 0.5) / (1 - kept) ** 0.5, rtol=1e-2, atol=1e-2)  # the same at every level


@pytest.mark.parametrize("path_type", PATHS)
def test_noise_of_a_transport(tmp_path, path_type):
    objective = {"name": "transport", "path_type": path_type, "prediction": "velocity"}
    checkpoint = read_checkpoint(sit_checkpoints.random_checkpoint(tmp_path / "sit.pt", objective=objective))
    x, times = noised(checkpoint, PROBE, 0.3, seed=3)
    assert_close(times, torch.tensor([0.7, 0.7]))
    alpha, sigma = {
        "Linear": (0.7, 0.3),
        "GVP": (np.sin(0.35 * np.pi), np.cos(0.35 * np.pi)),
        "VP": (a := np.exp(-0.25 * 0.09 * 19.9 - 0.05 * 0.3), np.sqrt(1 - a**2)),
    }[path_type]
    noise = (x - alpha * 0.5) / sigma
    assert abs(float(noise.std()) - 1) < 0.06 and abs(float(noise.mean())) < 0.06
