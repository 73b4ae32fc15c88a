"""data.sources: encoding on the fly equals the latent store of the same folder; dummy rows are functions of their index."""

import shutil
import tracemalloc

import numpy as np
import pytest
import torch

import extract_features
from data.codec import load_codec
from data.images import ImageFolder
from data.sources import DummySource, ImageSource, Source
from data.store import LatentStore

SHUFFLED = [11, 0, 5, 5, 13, 2]
MIRRORED = np.array([True, False, True, False, False, True])


@pytest.fixture(scope="module")
def pixels(image_folder) -> ImageSource:
    return ImageSource(image_folder, 16, load_codec("pixels"), num_workers=2)


@pytest.fixture(scope="module")
def encoded(image_folder, tiny_vae) -> ImageSource:
    return ImageSource(image_folder, 32, load_codec(str(tiny_vae)), num_workers=2)


def extracted(images, path, codec: str, size: int, *flags) -> LatentStore:
    common = [
        "--data-path",
        images,
        "--features-path",
        path,
        "--vae",
        codec,
        "--image-size",
        size,
        "--num-workers",
        0,
        "--flip",
    ]
    extract_features.main([str(flag) for flag in (*common, *flags)])
    return LatentStore.open(path)


def assert_same_facts(source: ImageSource, store: LatentStore) -> None:
    for name in ("num_images", "num_classes", "class_names", "codec", "scale", "image_size", "latent_shape", "needs_noise"):
        assert getattr(source, name) == getattr(store, name), name
    assert len(source) == len(store)
    assert source.has_flip and store.has_flip
    np.testing.assert_array_equal(source.labels, store.labels)
    assert source.labels.dtype == np.int64


def test_pixels_equal_the_store(image_folder, pixels, tmp_path):
    store = extracted(image_folder, tmp_path / "store", "pixels", 16)
    assert_same_facts(pixels, store)
    for flip in (None, MIRRORED):
        rows = pixels.rows(SHUFFLED, flip)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, store.rows(SHUFFLED, flip))


def test_vae_latents_equal_the_store_of_moments(image_folder, tiny_vae, encoded, tmp_path):
    store = extracted(image_folder, tmp_path / "store", str(tiny_vae), 32, "--store", "moments")
    assert_same_facts(encoded, store)
    noise = torch.randn(len(SHUFFLED), *store.latent_shape, generator=torch.Generator().manual_seed(0))
    for flip in (None, MIRRORED):
        rows = encoded.rows(SHUFFLED, flip, noise)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, store.rows(SHUFFLED, flip, noise), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encoded.rows(SHUFFLED, None, noise), rows, atol=1e-3)


def test_mirroring_turns_the_image_around(pixels):
    every = np.ones(14, bool)
    assert torch.equal(pixels.rows(range(14), every), pixels.rows(range(14)).flip(3))


def test_rows_follow_the_order_of_the_indices(pixels):
    every = pixels.rows(range(14))
    assert torch.equal(pixels.rows(SHUFFLED), every[SHUFFLED])
    assert torch.equal(pixels.rows(np.array(SHUFFLED)), every[SHUFFLED])
    assert pixels.rows([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("num_workers", [0, 1, 7])
def test_the_number_of_workers_changes_nothing(image_folder, pixels, num_workers):
    source = ImageSource(image_folder, 16, load_codec("pixels"), num_workers=num_workers)
    assert torch.equal(source.rows(SHUFFLED, MIRRORED), pixels.rows(SHUFFLED, MIRRORED))


def test_labels_are_positions_in_the_class_names(pixels):
    assert pixels.class_names == ["ant", "bee", "cat"]
    assert pixels.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 5


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_unreadable_image_is_named(image_folder, tmp_path, num_workers):
    """Of several, the first of the batch, however many threads read; the source goes on to work for others."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    (images / "ant" / "1.jpg").write_text("not an image")
    (images / "cat" / "0.png").write_bytes((images / "cat" / "0.png").read_bytes()[:400])
    source = ImageSource(images, 16, load_codec("pixels"), num_workers=num_workers)
    bad = {ImageFolder(images).paths.index(str(images / name)): name for name in ("ant/1.jpg", "cat/0.png")}
    for first, second in (sorted(bad), sorted(bad, reverse=True)):
        with pytest.raises(ValueError, match=rf"cannot read the image .*{bad[first]}: .*; replace or remove the file"):
            source.rows([0, first, 3, second])
    assert source.rows([0, 3]).shape == (2, 3, 16, 16)


def test_what_does_not_fit_a_folder_is_refused(image_folder, tmp_path, pixels, encoded):
    codec = load_codec("pixels")
    with pytest.raises(ValueError, match="num_workers -1 must be at least 0"):
        ImageSource(image_folder, 16, codec, num_workers=-1)
    with pytest.raises(ValueError, match="--image-size 36 must be a multiple of 8"):
        ImageSource(image_folder, 36, encoded.encoder)
    with pytest.raises(ValueError, match="does not exist"):
        ImageSource(tmp_path / "gone", 16, codec)
    with pytest.raises(ValueError, match=r"has rows 0\.\.13, asked for 3\.\.14"):
        pixels.rows([3, 14])
    with pytest.raises(ValueError, match=r"asked for -1\.\.-1"):
        pixels.rows([-1])
    with pytest.raises(ValueError, match=r"flip has shape \(2,\), but 3 rows"):
        pixels.rows([1, 2, 3], np.array([True, False]))
    unflipped = ImageSource(image_folder, 16, codec, flip=False)
    assert not unflipped.has_flip
    assert torch.equal(unflipped.rows([1, 2], np.zeros(2, bool)), pixels.rows([1, 2]))
    with pytest.raises(ValueError, match="opened with flip=False: open it with flip=True, or train without flips"):
        unflipped.rows([1, 2], np.array([True, False]))
    for noise in (None, torch.zeros(1, 4, 4, 4)):  # one row of noise would spread over both images
        with pytest.raises(ValueError, match=r"rows\(\) needs normals of shape \(2, 4, 4, 4\)"):
            encoded.rows([1, 2], noise=noise)


def test_dummy_rows_are_a_function_of_the_index():
    source = DummySource(100, 7)
    rows = source.rows([99, 3, 50])
    assert (rows.shape, rows.dtype) == ((3, 4, 32, 32), torch.float32)
    assert torch.equal(DummySource(1000, 10).rows([50, 99]), rows[[2, 0]])
    assert not torch.equal(rows[0], rows[1])
    every = source.rows(range(100))
    assert abs(every.mean()) < 5 / every.numel() ** 0.5  # five standard errors
    assert abs(every.var() - 1) < 5 * (2 / every.numel()) ** 0.5
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [i % 7 for i in range(100)]


def test_dummy_data_pass_for_a_codec_without_loading_it(monkeypatch):
    monkeypatch.setattr("data.codec._from_pretrained", lambda *_, **__: pytest.fail("loaded a VAE"))
    ema, pixels = DummySource(5, 3, image_size=512), DummySource(5, 3, image_size=64, codec="pixels")
    assert (ema.codec, ema.scale, ema.latent_shape, ema.image_size) == ("sd-vae-ft-ema", 0.18215, (4, 64, 64), 512)
    assert (pixels.codec, pixels.scale, pixels.latent_shape) == ("pixels", 1.0, (3, 64, 64))
    assert DummySource(5, 3, (16, 8, 8), 128, "some/vae").rows([0]).shape == (1, 16, 8, 8)
    assert (ema.num_images, ema.num_classes, ema.class_names, len(ema)) == (5, 3, None, 5)


def test_dummy_data_take_no_memory_but_the_labels():
    tracemalloc.start()
    source = DummySource(1_281_167, 1000)
    source.rows([0, 1_281_166])
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1.05 * source.labels.nbytes


def test_what_does_not_fit_dummy_data_is_refused():
    for name, wrong in (("num_images", (0, 3)), ("num_classes", (5, 0)), ("image_size", (5, 3, None, -8))):
        with pytest.raises(ValueError, match=f"{name} .* must be at least 1"):
            DummySource(*wrong)
    with pytest.raises(ValueError, match="--image-size 36 must be a multiple of 8"):
        DummySource(5, 3, image_size=36)
    with pytest.raises(ValueError, match=r"has rows 0\.\.4, asked for 5\.\.5"):
        DummySource(5, 3).rows([5])
    with pytest.raises(ValueError, match="no mirrored rows: train without flips"):
        DummySource(5, 3).rows([1], np.ones(1, bool))


def test_all_are_sources(pixels, latent_store):
    store = LatentStore.open(latent_store)
    assert store.image_size == 16
    for source in (store, pixels, DummySource(5, 3)):
        assert isinstance(source, Source)
    assert not isinstance(ImageFolder(pixels.path), Source)
