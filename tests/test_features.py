"""Feature extractors, against torch-fidelity's and timm's own use of the same weights."""

import argparse
import urllib.error

import numpy as np
import pytest
import timm
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluations import inception
from evaluations.features import create_features, features_name
from evaluations.inception import Inception, find_weights

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


def random_images(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


# --- pixels


def test_pixels_are_scaled_and_large_images_averaged():
    images = random_images(3, 6)[:, :4]
    flat = images.transpose(0, 3, 1, 2).reshape(3, -1) / np.float32(255)
    np.testing.assert_allclose(create_features("pixels")(images).pool, flat, rtol=1e-7)
    small = random_images(2, 32)
    large = np.repeat(np.repeat(small, 2, axis=1), 2, axis=2)
    pixels = create_features("pixels")
    np.testing.assert_allclose(pixels(large).pool, pixels(small).pool, rtol=1e-6)


# --- Inception


def torch_fidelity_layers(weights, images, dtype):
    """pool_3, mixed_6/conv and the probabilities by torch-fidelity's network as it is."""
    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights).to(dtype)
    network.feature_extractor_internal_dtype = dtype
    layers = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: layers.append(output.clone()))
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    spatial = layers[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)  # row, column, channel
    return pool.numpy(), spatial.numpy(), logits.softmax(dim=1).numpy()


def test_inception_is_torch_fidelitys(inception_weights):
    """Folding batch normalisation and channels-last change neither the layers nor their accuracy, seen from float64."""
    images = random_images(3, 40)
    features = Inception(torch.device("cpu"), inception_weights)(images)
    assert (features.pool.shape, features.spatial.shape, features.probs.shape) == ((3, 2048), (3, 2023), (3, 1008))
    port = torch_fidelity_layers(inception_weights, images, torch.float32)
    exact = torch_fidelity_layers(inception_weights, images, torch.float64)
    for ours, theirs, true in zip((features.pool, features.spatial, features.probs), port, exact, strict=True):
        scale = true.std()
        assert scale > 1e-4
        assert np.abs(ours - true).max() < 1e-4 * scale
        assert np.abs(ours - true).max() < 3 * np.abs(theirs - true).max()


def test_inception_file_with_code_is_refused(tmp_path):
    """torch-fidelity would unpickle it, and run what it says."""

    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"Conv2d_1a_3x3.conv.weight": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth holds pickled objects .* refused"):
        create_features("inception", inception_weights=tmp_path / "code.pth")


def test_inception_of_another_network_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit the FID Inception"):
        create_features("inception", inception_weights=tmp_path / "other.pth")


def test_where_the_weights_are_looked_for(tmp_path, monkeypatch):
    """The flag, the variable, the cache; then the network, whose failure says what to do."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)

    def offline(url, target, hash_prefix):
        assert (url.rsplit("/", 1)[1], hash_prefix) == (WEIGHTS_NAME, "6726825d")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"cannot download .*no network.* --inception-weights FILE"):
        find_weights()
    cached, named, flagged = tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME, tmp_path / "named.pth", tmp_path / "flag.pth"
    for path in (cached, named, flagged):
        path.write_bytes(b"")
    assert find_weights() == cached
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(named))
    assert find_weights() == named
    assert find_weights(flagged) == flagged
    named.unlink()
    with pytest.raises(ValueError, match=r"INCEPTION_WEIGHTS .*named\.pth is no file"):
        find_weights()


def test_a_download_with_another_checksum_is_no_file(tmp_path, monkeypatch):
    """torch hub compares the file's hash with the digits in its name, and leaves nothing behind when they differ."""
    (tmp_path / "wrong").write_bytes(b"not the weights")
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"file://{tmp_path}/wrong")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(ValueError, match="invalid hash value"):
        find_weights()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


# --- networks of the user's choice


@pytest.fixture
def timm_weights(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "resnet10t.pth")
    return model.eval(), tmp_path / "resnet10t.pth"


def test_timm_features_are_the_models_own(timm_weights):
    """At the network's input size nothing is resized: its own transform's mean and deviation remain."""
    model, path = timm_weights
    config = timm.data.resolve_model_data_config(model)
    images = random_images(2, config["input_size"][1])
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    extractor = create_features("timm:resnet10t", timm_weights=path)
    np.testing.assert_allclose(extractor(images).pool, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert extractor(random_images(2, 50)).pool.shape == expected.shape


def test_timm_bad_input(timm_weights):
    _, path = timm_weights
    for name, message in [
        ("timm:nosuchmodel", "nosuchmodel"),
        ("timm:resnet18", r"does not fit: \d+ weights are missing \(.*\), \d+ are of another model"),
        ("pixels", "--features pixels has no use for them"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_features(name, timm_weights=path)
    with pytest.raises(ValueError, match="--features pixels has no use for them"):
        create_features("pixels", inception_weights=path)


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return x.float().mean(dim=(2, 3))


class Asserting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 299, "299 pixels only"
        return x.flatten(1)


class Whole(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_modules(tmp_path):
    images = random_images(3, 5)
    torch.jit.save(torch.jit.script(Means()), str(tmp_path / "means.pt"))
    torch.jit.save(torch.jit.script(Whole()), str(tmp_path / "whole.pt"))
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    extractor = create_features(str(tmp_path / "means.pt"))
    np.testing.assert_allclose(extractor(images).pool, images.mean(axis=(1, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"whole\.pt must return features \(3, D\) for 3 images, it returned \(3, 3, 5, 5\)"):
        create_features(str(tmp_path / "whole.pt"))(images)
    torch.jit.save(torch.jit.script(Asserting()), str(tmp_path / "asserting.pt"))
    with pytest.raises(ValueError, match=r"asserting\.pt fails on uint8 images \(3, 3, 5, 5\): .*299 pixels only"):
        create_features(str(tmp_path / "asserting.pt"))(images)
    with pytest.raises(ValueError, match=r"broken\.pt is no TorchScript module"):
        create_features(str(tmp_path / "broken.pt"))
    with pytest.raises(ValueError, match=r"absent\.pt: there is no such file"):
        create_features(str(tmp_path / "absent.pt"))


def test_unknown_names():
    for name in ("vgg", "timm:", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is unknown: pass inception"):
            features_name(name)
    with pytest.raises(ValueError, match="'vgg' is unknown"):
        create_features("vgg")
