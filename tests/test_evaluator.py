"""evaluator.py and reference.py: what they print and write, and what they say to bad input."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import store
from data.codec import Codec, to_float
from data.images import load_image
from evaluations import evaluator, features, reference
from evaluations.features import Features, create_features
from evaluations.metrics import frechet_distance, inception_score, mean_covariance, precision_recall
from runtime import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def files(tmp_path, rng):
    """ref.npz and samples.npz: 60 and 50 images of 4 x 4, of different brightness."""
    ref, samples = rng.integers(0, 200, (60, 4, 4, 3), np.uint8), rng.integers(30, 256, (50, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "ref.npz", ref)
    np.savez_compressed(tmp_path / "samples.npz", samples)
    return tmp_path, ref, samples


def flat(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)


def evaluate(folder, *flags, ref="ref.npz", samples="samples.npz"):
    return evaluator.main([str(folder / ref), str(folder / samples), *flags])


def fails(capsys, main, *argv):
    """Run a script as its command line does; the one line it leaves on stderr."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: main(list(map(str, argv))))
    assert exit_.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1
    return lines[0]


# --- features


def test_pixels_are_scaled_and_large_images_averaged(rng):
    images = rng.integers(0, 256, (3, 4, 6, 3), np.uint8)
    np.testing.assert_allclose(create_features("pixels")(images).pool, flat(images), rtol=1e-7)
    large = np.repeat(np.repeat(rng.integers(0, 256, (2, 32, 32, 3), np.uint8), 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(create_features("pixels")(large).pool, flat(large[:, ::2, ::2]), rtol=1e-6)


def test_unknown_features_names_those_that_exist():
    with pytest.raises(ValueError, match=r"'vgg' is unknown; there are: pixels"):
        create_features("vgg")


# --- evaluator


def test_prints_adms_lines_with_the_values_of_the_metrics(files, capsys):
    folder, ref, samples = files
    result = evaluate(folder)
    fid = frechet_distance(*mean_covariance(flat(ref)), *mean_covariance(flat(samples)))
    precision, recall = precision_recall(flat(ref), flat(samples))
    assert result["fid"] == pytest.approx(fid, rel=1e-6)
    assert (result["precision"], result["recall"]) == (precision, recall)
    assert result["inception_score"] is None and result["sfid"] is None
    assert capsys.readouterr().out.splitlines() == [
        "Inception Score: n/a (these features have no such layer)",
        f"FID: {result['fid']} (pixels)",
        "sFID: n/a (these features have no such layer)",
        f"Precision: {precision} (pixels)",
        f"Recall: {recall} (pixels)",
    ]


def test_batch_size_changes_nothing_and_json_holds_the_result(files, capsys):
    folder, _, _ = files
    whole = evaluate(folder, "--batch-size", "1000")
    result = evaluate(folder, "--batch_size=7", "--json", str(folder / "out" / "metrics.json"))
    assert result == whole
    assert json.loads((folder / "out" / "metrics.json").read_text()) == result
    assert (result["num_ref"], result["num_samples"], result["features"], result["half"]) == (60, 50, "pixels", False)


def test_half_reaches_precision_and_recall(files):
    folder, ref, samples = files
    result = evaluate(folder, "--half")
    assert (result["precision"], result["recall"]) == precision_recall(flat(ref), flat(samples), half=True)
    assert result["half"] is True


def test_a_set_against_itself(files):
    folder, _, _ = files
    result = evaluate(folder, samples="ref.npz")
    assert result["fid"] == pytest.approx(0, abs=1e-9)
    assert (result["precision"], result["recall"]) == (1, 1)


def test_carried_statistics_are_used_instead_of_the_images(files):
    folder, ref, samples = files
    mu, sigma = mean_covariance(flat(ref))
    np.savez(folder / "carrying.npz", arr_0=ref, mu=mu + 1, sigma=4 * sigma)
    expected = frechet_distance(mu + 1, 4 * sigma, *mean_covariance(flat(samples)))
    assert evaluate(folder, ref="carrying.npz")["fid"] == pytest.approx(expected, rel=1e-6)


def test_statistics_alone_give_fid_only(files, capsys):
    folder, ref, _ = files
    mu, sigma = mean_covariance(flat(ref))
    np.savez(folder / "statistics.npz", mu=mu, sigma=sigma)
    fid = evaluate(folder)["fid"]
    capsys.readouterr()
    result = evaluate(folder, ref="statistics.npz")
    assert result["fid"] == pytest.approx(fid, rel=1e-9)
    assert result["precision"] is None and result["recall"] is None
    assert "Recall: n/a (the reference holds statistics only, no images)" in capsys.readouterr().out


def test_statistics_of_other_features(files, capsys):
    """ADM's reference batches carry Inception's: pixels must not be compared with them."""
    folder, ref, _ = files
    np.savez(folder / "inception.npz", arr_0=ref, mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    fid = evaluate(folder)["fid"]
    assert evaluate(folder, ref="inception.npz")["fid"] == fid
    assert "mu of (2048,) features, these are (48,)" in capsys.readouterr().err
    message = fails(capsys, evaluator.main, folder / "statistics.npz", folder / "samples.npz")
    assert re.search(r"statistics of \(2048,\) features and no images, these features are \(48,\)", message)


@pytest.fixture
def three_layers(monkeypatch):
    """An extractor with all layers, under the name of the pixels."""

    def extract(images):
        pool = flat(images).astype(np.float32)
        return Features(pool=pool[:, :10], spatial=pool[:, 10:30], probs=np.exp(pool) / np.exp(pool).sum(1, keepdims=True))

    monkeypatch.setitem(features.EXTRACTORS, "pixels", lambda: extract)
    return extract


def test_extractor_with_all_layers(files, three_layers):
    folder, ref, samples = files
    ref_layers, layers = three_layers(ref), three_layers(samples)
    result = evaluate(folder, "--split-size", "20", "--batch-size", "9")
    assert result["inception_score"] == pytest.approx(inception_score(layers.probs, 20), rel=1e-6)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        both = mean_covariance(getattr(ref_layers, layer)), mean_covariance(getattr(layers, layer))
        assert result[key] == pytest.approx(frechet_distance(*both[0], *both[1]), rel=1e-6)


def test_statistics_without_the_spatial_layer(files, three_layers, capsys):
    folder, ref, _ = files
    mu, sigma = mean_covariance(three_layers(ref).pool)
    np.savez(folder / "statistics.npz", mu=mu, sigma=sigma)
    assert evaluate(folder, ref="statistics.npz")["sfid"] is None
    assert "sFID: n/a (the reference has neither images nor mu_s and sigma_s)" in capsys.readouterr().out


def test_non_finite_feature_names_file_and_image(files, monkeypatch, capsys):
    folder, _, samples = files

    def extract(images):
        pool = flat(images)
        pool[(images == samples[23]).all(axis=(1, 2, 3))] = np.nan
        return Features(pool=pool)

    monkeypatch.setitem(features.EXTRACTORS, "pixels", lambda: extract)
    message = fails(capsys, evaluator.main, folder / "ref.npz", folder / "samples.npz", "--batch-size", 8)
    assert re.search(r"samples\.npz: image 23 has a non-finite pool feature", message)


IMAGES = np.zeros((6, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "has no array named arr_0; it holds images"),
        ({"arr_0": IMAGES / 255}, r"arr_0 is float64, images are uint8 from 0 to 255.*round\(\)"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"\(6, 3, 4, 4\), channels first: save arr_0\.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": IMAGES[..., :1]}, r"\(6, 4, 4, 1\), RGB images \(N, H, W, 3\)"),
        ({"arr_0": IMAGES[0]}, r"\(4, 4, 3\), RGB images \(N, H, W, 3\)"),
        ({"arr_0": IMAGES[:1]}, r"holds 1 image\(s\)"),
        ({"arr_0": IMAGES[:0]}, r"\(0, 4, 4, 3\)"),
        ({"arr_0": np.zeros((6, 8, 8, 3), np.uint8)}, r"ref\.npz holds images of \(H, W, C\) \(4, 4, 3\), .* of \(8, 8, 3\)"),
        ({"mu": np.zeros(48), "sigma": np.eye(48)}, "holds statistics and no images: are REF and SAMPLES swapped"),
    ],
)
def test_bad_samples(files, capsys, arrays, message):
    folder, _, _ = files
    np.savez(folder / "bad.npz", **arrays)
    line = fails(capsys, evaluator.main, folder / "ref.npz", folder / "bad.npz")
    assert re.search(message, line) and "bad.npz" in line


def test_bad_files(files, capsys):
    folder, _, _ = files
    whole = (folder / "ref.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-100])
    assert "cut.npz is not a whole .npz file" in fails(capsys, evaluator.main, folder / "cut.npz", folder / "samples.npz")
    assert "absent.npz does not exist" in fails(capsys, evaluator.main, folder / "ref.npz", folder / "absent.npz")


def test_reference_given_as_samples_is_noted(files, capsys):
    folder, ref, _ = files
    mu, sigma = mean_covariance(flat(ref))
    np.savez(folder / "carrying.npz", arr_0=ref, mu=mu, sigma=sigma)
    evaluate(folder, samples="carrying.npz")
    assert "REF comes first" in capsys.readouterr().err


def test_unknown_features_flag(files, capsys):
    folder, _, _ = files
    with pytest.raises(SystemExit) as exit_:
        evaluate(folder, "--features", "vgg")
    assert exit_.value.code == 2
    assert "invalid choice: 'vgg'" in capsys.readouterr().err


# --- the scripts as scripts


@pytest.mark.parametrize("script", ["evaluator.py", "reference.py"])
def test_missing_installation_is_one_line(monkeypatch, script):
    """Python puts only evaluations/ on the path of a script there."""
    monkeypatch.setitem(sys.modules, "runtime", None)
    with pytest.raises(SystemExit, match=r"^error: install the repository first: pip install -e \.$"):
        runpy.run_path(str(ROOT / "evaluations" / script))


def test_runs_from_its_own_folder(files):
    folder, _, _ = files
    command = [sys.executable, "evaluator.py", folder / "ref.npz", folder / "samples.npz"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "evaluations", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(evaluator.LINES)


# --- reference


@pytest.fixture
def image_folder(tmp_path, rng):
    for index in range(10):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + index, 24, 3), np.uint8)).save(path)
    return tmp_path / "images"


def build(data_path, *flags):
    path = data_path.parent / "built.npz"
    reference.main([str(data_path), str(path), *map(str, flags)])
    with np.load(path) as built:
        assert built.files == ["arr_0"]
        return built["arr_0"]


def test_reference_of_an_image_folder(image_folder):
    expected = np.stack([load_image(path, 8) for path in sorted(image_folder.glob("*/*.png"))])
    np.testing.assert_array_equal(build(image_folder, "--image-size", 8, "--batch-size", 3), expected)


def test_num_images_is_a_fixed_subset(image_folder):
    every = build(image_folder, "--image-size", 8)
    subset = build(image_folder, "--image-size", 8, "--num-images", 4)
    positions = [next(i for i, image in enumerate(every) if (image == chosen).all()) for chosen in subset]
    assert positions == sorted(set(positions)) and positions != [0, 1, 2, 3]
    np.testing.assert_array_equal(build(image_folder, "--image-size", 8, "--num-images", 4, "--num-workers", 1), subset)
    assert not np.array_equal(build(image_folder, "--image-size", 8, "--num-images", 4, "--seed", 1), subset)


def save_store(path, latents, **changes):
    path.mkdir()
    meta = {"codec": "pixels", "scale": 1.0, "image_size": 8, "store": "latents", "flip": False, "shape": list(latents.shape)}
    (path / store.META).write_text(json.dumps({"format": store.FORMAT} | meta | changes))
    np.save(path / store.LATENTS, latents)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reference_of_a_pixel_store(tmp_path, rng, dtype):
    images = rng.integers(0, 256, (9, 8, 8, 3), np.uint8)
    path = save_store(tmp_path / "store", to_float(torch.from_numpy(images)).numpy().astype(dtype))
    np.testing.assert_array_equal(build(path, "--batch-size", 4), images)
    np.testing.assert_array_equal(build(path, "--image-size", 8), images)


class HalvingCodec(Codec):
    """Two latent channels at half the size; an image is grey, of the value scale-free channel 0."""

    name, scale, downsample, latent_channels = "halving", 0.5, 2, 2

    def decode(self, latents):
        grey = (latents[:, :1] / self.scale).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).round().to(torch.uint8)


def test_reference_of_moments_decodes_the_mean_whatever_the_scale(tmp_path, rng, monkeypatch):
    asked = []
    monkeypatch.setattr(reference, "load_codec", lambda name, device: asked.append(name) or HalvingCodec())
    mean, logvar = rng.integers(0, 256, (5, 2, 4, 4)).astype(np.float32), np.full((5, 2, 4, 4), 5, np.float32)
    moments = np.concatenate([mean, logvar], axis=1)
    path = save_store(tmp_path / "store", moments, codec="sd-vae-ft-ema", scale=0.25, store="moments")
    built = build(path)
    np.testing.assert_array_equal(built[:, ::2, ::2, 1], mean[:, 0])
    build(path, "--vae", "local")
    assert asked == ["sd-vae-ft-ema", "local"]


def test_reference_bad_input(image_folder, tmp_path, rng, capsys):
    latents = rng.random((3, 4, 4, 4), np.float32)
    path, out = save_store(tmp_path / "store", latents), tmp_path / "out.npz"
    for argv, message in [
        ((image_folder, tmp_path / "out"), r"must be named \*\.npz"),
        ((image_folder, out), r"--image-size is needed"),
        ((image_folder, out, "--image-size", 8, "--vae", "pixels"), r"--vae pixels decodes latent stores"),
        ((image_folder, out, "--image-size", 8, "--num-images", 11), r"--num-images 11: .* holds only 10"),
        ((tmp_path / "absent", out, "--image-size", 8), r"absent does not exist"),
        ((path, out, "--image-size", 16), r"--image-size 16: .* latents of 8-pixel images"),
        ((path, out, "--vae", "pixels"), r"codec pixels has latents of \(3, 8, 8\), .* holds \(4, 4, 4\)"),
    ]:
        assert re.search(message, fails(capsys, reference.main, *argv))
    (image_folder / "class0" / "broken.png").write_bytes(b"no image")
    assert "broken.png" in fails(capsys, reference.main, image_folder, out, "--image-size", 8)
    assert not out.exists()
