"""reference.py: what a reference batch holds, whatever it is made from and by how many processes."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data import store
from data.codec import Codec, to_float
from data.images import ImageFolder, load_image
from evaluations import reference
from evaluations.metrics import mean_covariance
from tests.launch import run_script


def flat(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)


def build(data_path, path, *flags):
    reference.main([str(data_path), str(path), "--features", "pixels", *map(str, flags)])
    with np.load(path) as built:
        return dict(built)


def images_of(folder, size):
    return np.stack([load_image(path, size) for path in ImageFolder(folder).paths])


def test_holds_images_labels_and_statistics(image_folder, tmp_path, capsys):
    built = build(image_folder, tmp_path / "ref.npz", "--image-size", 8, "--batch-size", 3)
    images = images_of(image_folder, 8)
    mu, sigma = mean_covariance(flat(images))
    assert sorted(built) == ["arr_0", "arr_1", "features", "mu", "sigma"]
    np.testing.assert_array_equal(built["arr_0"], images)
    np.testing.assert_array_equal(built["arr_1"], ImageFolder(image_folder).labels)
    np.testing.assert_allclose(built["mu"], mu, rtol=1e-6)
    np.testing.assert_allclose(built["sigma"], sigma, rtol=1e-6, atol=1e-9)
    assert built["features"].tolist() == ["pixels"]
    assert "14 images for 192 features, whose covariance they cannot determine" in capsys.readouterr().err


def test_statistics_are_of_the_whole_set(image_folder, tmp_path, fresh_accelerate_state):
    """ADM's references hold 10,000 images, and statistics of all."""
    every = build(image_folder, tmp_path / "all.npz", "--image-size", 8)
    fresh_accelerate_state()
    few = build(image_folder, tmp_path / "few.npz", "--image-size", 8, "--num-images", 4)
    np.testing.assert_array_equal(few["sigma"], every["sigma"])
    assert len(few["arr_0"]) == len(few["arr_1"]) == 4
    positions = [next(i for i, image in enumerate(every["arr_0"]) if (image == chosen).all()) for chosen in few["arr_0"]]
    assert positions == sorted(set(positions)) and positions != [0, 1, 2, 3]
    np.testing.assert_array_equal(few["arr_1"], every["arr_1"][positions])
    fresh_accelerate_state()
    other = build(image_folder, tmp_path / "other.npz", "--image-size", 8, "--num-images", 4, "--seed", 1, "--num-workers", 1)
    assert not np.array_equal(other["arr_0"], few["arr_0"])


def test_without_statistics(image_folder, tmp_path):
    assert sorted(build(image_folder, tmp_path / "ref.npz", "--image-size", 8, "--no-statistics")) == ["arr_0", "arr_1"]


def test_two_processes_write_what_one_writes(image_folder, tmp_path):
    one = build(image_folder, tmp_path / "one.npz", "--image-size", 8, "--num-images", 6, "--batch-size", 4)
    flags = ("--image-size", "8", "--num-images", "6", "--batch-size", "4", "--features", "pixels")
    run_script("evaluations/reference.py", str(image_folder), str(tmp_path / "two.npz"), *flags, processes=2)
    with np.load(tmp_path / "two.npz") as two:
        assert sorted(two) == sorted(one)
        np.testing.assert_array_equal(two["arr_0"], one["arr_0"])
        np.testing.assert_allclose(two["mu"], one["mu"], rtol=1e-12)
        np.testing.assert_allclose(two["sigma"], one["sigma"], rtol=1e-9, atol=1e-12)


# --- latent stores


def save_store(path, latents, **changes):
    path.mkdir()
    meta = {"codec": "pixels", "scale": 1.0, "image_size": 8, "store": "latents", "flip": False, "shape": list(latents.shape)}
    (path / store.META).write_text(json.dumps({"format": store.FORMAT} | meta | changes))
    np.save(path / store.LATENTS, latents)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_of_a_pixel_store(tmp_path, rng, dtype):
    images = rng.integers(0, 256, (9, 8, 8, 3), np.uint8)
    path = save_store(tmp_path / "store", to_float(torch.from_numpy(images)).numpy().astype(dtype))
    built = build(path, tmp_path / "ref.npz", "--batch-size", 4, "--image-size", 8)
    np.testing.assert_array_equal(built["arr_0"], images)
    np.testing.assert_allclose(built["sigma"], mean_covariance(flat(images))[1], rtol=1e-6, atol=1e-9)


class HalvingCodec(Codec):
    """Two latent channels at half the size; an image is grey, of the value scale-free channel 0."""

    name, scale, downsample, latent_channels = "halving", 0.5, 2, 2

    def decode(self, latents):
        grey = (latents[:, :1] / self.scale).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).round().to(torch.uint8)


def test_of_moments_decodes_the_mean_whatever_the_scale(tmp_path, rng, monkeypatch, fresh_accelerate_state):
    asked = []
    monkeypatch.setattr(reference, "load_codec", lambda name, device: asked.append(name) or HalvingCodec())
    mean, logvar = rng.integers(0, 256, (5, 2, 4, 4)).astype(np.float32), np.full((5, 2, 4, 4), 5, np.float32)
    moments = np.concatenate([mean, logvar], axis=1)
    path = save_store(tmp_path / "store", moments, codec="sd-vae-ft-ema", scale=0.25, store="moments")
    built = build(path, tmp_path / "ref.npz")
    np.testing.assert_array_equal(built["arr_0"][:, ::2, ::2, 1], mean[:, 0])
    fresh_accelerate_state()
    build(path, tmp_path / "ref.npz", "--vae", "local")
    assert asked == ["sd-vae-ft-ema", "local"]


def test_a_non_finite_feature_names_the_image_on_any_process(image_folder, tmp_path):
    """Every process counted its images from 0, and named another one."""
    module = tmp_path / "logarithm.pt"
    torch.jit.save(torch.jit.script(Logarithm()), str(module))
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for index in range(12):
        Image.fromarray(np.full((8, 8, 3), 0 if index == 8 else 50 + index, np.uint8)).save(folder / f"{index:02}.png")
    flags = ("--image-size", "8", "--features", str(module), "--batch-size", "2")
    done = run_script("evaluations/reference.py", str(folder.parent), str(tmp_path / "a.npz"), *flags, processes=2, expect=1)
    assert done.stderr.count("error: ") == 1
    assert f"{folder / '08.png'} has a non-finite pool feature" in done.stderr


class Logarithm(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float().log()


def test_bad_input(image_folder, tmp_path, rng, fails, fresh_accelerate_state):
    path, out = save_store(tmp_path / "store", rng.random((3, 4, 4, 4), np.float32)), tmp_path / "out.npz"
    broken = tmp_path / "broken" / "class0"
    broken.mkdir(parents=True)
    (broken / "broken.png").write_bytes(b"no image")
    for argv, message in [
        ((image_folder, image_folder / "ant" / "0.png" / "a.npz", "--image-size", 8), r"cannot write .*a\.npz"),
        ((image_folder, tmp_path / "out"), r"must be named \*\.npz"),
        ((image_folder, out), r"--image-size is needed"),
        ((image_folder, out, "--image-size", 8, "--vae", "pixels"), r"--vae pixels decodes latent stores"),
        ((tmp_path / "absent", out, "--image-size", 8), r"absent does not exist"),
        ((path, out, "--image-size", 16), r"--image-size 16: .* latents of 8-pixel images"),
        ((path, out, "--vae", "pixels"), r"codec pixels has latents of \(3, 8, 8\), .* holds \(4, 4, 4\)"),
        ((broken.parent, out, "--image-size", 8), r"a covariance needs two images, there is 1: use --no-statistics"),
        ((broken.parent, out, "--image-size", 8, "--no-statistics"), r"broken\.png"),
        ((image_folder, out, "--image-size", 8, "--inception-weights", "a.pth"), r"--features pixels has no use for them"),
    ]:
        fresh_accelerate_state()
        assert re.search(message, fails(reference.main, *argv, "--features", "pixels"))
    assert not out.exists()
