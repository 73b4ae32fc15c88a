"""data.codec: exact round trips, agreement with direct diffusers calls, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data.codec import load_codec, sample_posterior


def random_images(count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8))


@pytest.fixture(scope="module")
def vae(tiny_vae):
    return AutoencoderKL.from_pretrained(tiny_vae).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_are_inverted_exactly(dtype):
    """All 256 values come back, also after being stored in half precision."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    codec = load_codec("pixels")
    latents = codec.encode(images, None)
    assert latents.shape == (1, 3, 16, 16)
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(codec.decode(latents.to(dtype)), images)


def test_decoding_clamps_and_truncates():
    latents = torch.tensor([-9.0, -1.0, 0.0, 0.0078, 0.99999, 9.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    expected = torch.tensor([0, 0, 128, 128, 255, 255], dtype=torch.uint8)
    assert torch.equal(load_codec("pixels").decode(latents)[0, 0, :, 0], expected)


def test_pixels_take_float_images_and_have_no_posterior():
    codec = load_codec("pixels")
    images = random_images(2, 8)
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(codec.encode(images, torch.randn(2, 3, 8, 8)), floats)
    assert torch.equal(codec.encode(floats, None), floats)
    assert torch.equal(codec.moments(images)[0], floats)
    assert (codec.name, codec.scale, codec.downsample, codec.latent_channels) == ("pixels", 1.0, 1, 3)
    assert not codec.stochastic


def test_vae_equals_direct_calls(tiny_vae, vae):
    codec = load_codec(str(tiny_vae))
    assert (codec.name, codec.scale, codec.downsample, codec.latent_channels) == (str(tiny_vae), 0.18215, 8, 4)
    assert codec.latent_shape(32) == (4, 4, 4)
    assert not codec.vae.training
    assert not any(p.requires_grad for p in codec.vae.parameters())

    images, noise = random_images(3, 32), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        latents = 0.18215 * (posterior.mean + posterior.std * noise)
        decoded = vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(codec.encode(images, noise), latents)
    torch.testing.assert_close(codec.encode(images, None), 0.18215 * posterior.mean)
    for ours, theirs in zip(codec.moments(images), (posterior.mean, posterior.logvar), strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert codec.decode(latents).shape == (3, 32, 32, 3)
    assert (codec.decode(latents).int() - expected.int()).abs().max() <= 1


def test_noise_changes_latents_by_the_standard_deviation(tiny_vae):
    codec = load_codec(str(tiny_vae))
    images = random_images(1, 32)
    _, logvar = codec.moments(images)
    difference = codec.encode(images, torch.ones(1, 4, 4, 4)) - codec.encode(images, torch.zeros(1, 4, 4, 4))
    torch.testing.assert_close(difference, 0.18215 * torch.exp(0.5 * logvar), rtol=1e-4, atol=1e-6)


def test_posterior_clamps_the_log_variance():
    values = sample_posterior(torch.zeros(3), torch.tensor([-90.0, 0.0, 90.0]), torch.ones(3))
    torch.testing.assert_close(values, torch.exp(torch.tensor([-15.0, 0.0, 10.0])))


@pytest.mark.parametrize(("size", "slices"), [(16, [5]), (32, [2, 2, 1]), (48, [1] * 5)])
def test_the_vae_works_in_slices_of_so_many_pixels(tiny_vae, vae, size, slices):
    """A slice used to be 16 images whatever their size when decoding, and the whole batch when encoding."""
    codec = load_codec(str(tiny_vae))
    assert codec.slice_pixels == 16 * 256 * 256
    codec.slice_pixels = 2 * 32 * 32
    seen = {"encoder": [], "decoder": []}
    for name, sizes in seen.items():
        getattr(codec.vae, name).register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
    images, noise = random_images(5, size), torch.randn(5, 4, size // 8, size // 8)
    floats = images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(floats).latent_dist
        latents = 0.18215 * (posterior.mean + posterior.std * noise)
        decoded = vae.decode(latents / 0.18215).sample
    for given in (images, floats):
        torch.testing.assert_close(codec.encode(given, noise), latents)
        for ours, theirs in zip(codec.moments(given), (posterior.mean, posterior.logvar), strict=True):
            torch.testing.assert_close(ours, theirs)
    expected = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (codec.decode(latents).int() - expected.int()).abs().max() <= 1
    assert seen == {"encoder": 4 * slices, "decoder": slices}


def test_the_vae_works_channels_last(tiny_vae, vae):
    """Weights and what its convolutions are given; before the rounding to grey levels it changes nothing but the order of
    sums."""
    codec, seen = load_codec(str(tiny_vae)), []

    def look(_, args):
        seen.append(args[0].is_contiguous(memory_format=torch.channels_last))

    for part in (codec.vae.encoder, codec.vae.decoder):
        for layer in (part.conv_in, part.conv_out):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
            layer.register_forward_pre_hook(look)
    images, latents = (random_images(2, 32).permute(0, 3, 1, 2) / 127.5 - 1).contiguous(), torch.randn(2, 4, 4, 4)
    decoded = []
    codec.vae.decoder.register_forward_hook(lambda _, args, out: decoded.append(out))
    codec.decode(latents)
    with torch.no_grad():
        torch.testing.assert_close(decoded[0], vae.decode(latents / codec.scale).sample, rtol=1e-5, atol=1e-5)
        mean = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(codec.moments(images)[0], mean, rtol=1e-5, atol=1e-5)
    assert seen == [True] * 4


def test_torch_weights_are_read_too(tiny_vae, vae, tmp_path):
    vae.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    images = random_images(1, 32)
    assert torch.equal(load_codec(str(tmp_path)).encode(images, None), load_codec(str(tiny_vae)).encode(images, None))


def test_image_size_must_divide(tiny_vae):
    with pytest.raises(ValueError, match="--image-size 36 must be a multiple of 8"):
        load_codec(str(tiny_vae)).latent_shape(36)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "no-such-name", "a/b/c", ""])
def test_missing_folders_never_reach_the_network(name, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(ValueError, match=r"folder does not exist|not an AutoencoderKL folder"):
        load_codec(name)


@pytest.mark.parametrize("name", ["sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", "someone/vae"])
def test_unreachable_hub_says_what_to_do(name, monkeypatch):
    asked = []

    def unreachable(source, **_):
        asked.append(source)
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"could not be fetched from the hub .We couldn't connect.: download it .* pass the folder with --vae"
    ):
        load_codec(name)
    assert asked == ["someone/vae" if name == "someone/vae" else "stabilityai/sd-vae-ft-ema"]


def test_hub_codecs_go_by_their_short_name(vae, monkeypatch):
    info = {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: (vae, info))
    for name in ("stabilityai/sd-vae-ft-mse", "sd-vae-ft-mse", "mse"):  # the last as the SiT scripts say
        assert load_codec(name).name == "sd-vae-ft-mse"
    assert load_codec("someone/vae").name == "someone/vae"


def test_other_folders_are_refused(tiny_vae, tmp_path):
    with pytest.raises(ValueError, match="is not an AutoencoderKL folder"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="is not an AutoencoderKL folder"):
        load_codec(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        load_codec(str(tiny_vae / "config.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 4}, "maps 4 to 3 image channels"),
        ({"shift_factor": 0.1159}, "has shift_factor 0.1159"),
        ({"latents_mean": [0.0, 1.0, 0.0, 0.0]}, "has latents_mean"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0: it must be above 0"),
    ],
)
def test_incompatible_vaes_are_refused(tiny_vae, tmp_path, change, message):
    folder = shutil.copytree(tiny_vae, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_codec(str(folder))


def test_damaged_weights_are_refused(tiny_vae, tmp_path):
    """diffusers fills weights that the file lacks with random ones and only warns."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_vae, tmp_path / "vae")
    weights_path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(weights_path)
    del weights["encoder.conv_in.weight"]
    save_file(weights, weights_path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot load its weights: .*encoder\.conv_in\.weight"):
        load_codec(str(folder))
    weights_path.write_bytes(weights_path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot load its weights"):
        load_codec(str(folder))
    weights_path.unlink()
    with pytest.raises(ValueError, match="cannot load its weights"):
        load_codec(str(folder))
