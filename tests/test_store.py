"""data.store: what is read back, and a clear error for every way a store can be wrong."""

import json

import numpy as np
import pytest
import torch

from data.store import LatentStore

N, C, S = 6, 4, 2


def make_store(path, kind="latents", flip=False, dtype=np.float32, progress=None, **changes):
    """A store written with numpy alone; returns the array of latents.npy."""
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (N, C * (2 if kind == "moments" else 1), S, S)
    latents, flipped = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    np.save(path / "latents.npy", latents)
    if flip:
        np.save(path / "latents_flipped.npy", flipped)
    np.save(path / "labels.npy", np.arange(N) % 3)
    if progress is not None:
        np.asarray(progress, np.uint8).tofile(path / "latents.progress")
    meta = {
        "format": 1,
        "complete": True,
        "codec": "sd-vae-ft-ema",
        "scale": 0.18215,
        "image_size": 16,
        "store": kind,
        "shape": shape,
        "flip": flip,
        "class_names": ["a", "b", "c"],
    }
    (path / "meta.json").write_text(json.dumps({**meta, **changes}))
    return latents


def make_published(path, size=256, stems=range(12), shape=(1, C, S, S)):
    rng = np.random.default_rng(0)
    rows = {}
    for kind in ("features", "labels"):
        (path / f"imagenet{size}_{kind}").mkdir(parents=True)
    for stem in stems:
        rows[stem] = rng.standard_normal(shape).astype(np.float32)
        np.save(path / f"imagenet{size}_features" / f"{stem}.npy", rows[stem])
        np.save(path / f"imagenet{size}_labels" / f"{stem}.npy", np.array([stem % 5]))
    return rows


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_by_row(tmp_path, dtype):
    latents = make_store(tmp_path, dtype=dtype)
    store = LatentStore.open(str(tmp_path))
    assert (store.num_images, len(store), store.num_classes, store.latent_shape) == (N, N, 3, (C, S, S))
    assert (store.codec, store.scale, store.needs_noise, store.has_flip) == ("sd-vae-ft-ema", 0.18215, False, False)
    assert store.class_names == ["a", "b", "c"]
    np.testing.assert_array_equal(store.labels, np.arange(N) % 3)
    assert store.labels.dtype == np.int64
    rows = store.rows([5, 0, 3, 3])
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows, latents[[5, 0, 3, 3]].astype(np.float32))
    assert store.rows([]).shape == (0, C, S, S)


def test_latents_stay_on_disk(tmp_path):
    make_store(tmp_path)
    assert isinstance(LatentStore.open(tmp_path)._latents, np.memmap)


def test_flipped_rows(tmp_path):
    latents = make_store(tmp_path, flip=True)
    flipped = np.load(tmp_path / "latents_flipped.npy")
    rows = LatentStore.open(tmp_path).rows([4, 1, 4, 0], flip=np.array([True, False, False, True]))
    np.testing.assert_array_equal(rows, [flipped[4], latents[1], latents[4], flipped[0]])


def test_moments_are_sampled_and_scaled(tmp_path):
    moments = torch.from_numpy(make_store(tmp_path, kind="moments"))
    store = LatentStore.open(tmp_path)
    assert store.latent_shape == (C, S, S)
    assert store.needs_noise
    noise = torch.randn(3, C, S, S)
    mean, logvar = moments[[2, 5, 0]].chunk(2, dim=1)
    torch.testing.assert_close(store.rows([2, 5, 0], noise=noise), 0.18215 * (mean + (0.5 * logvar).exp() * noise))
    with pytest.raises(ValueError, match=r"holds moments: rows.. needs noise of shape"):
        store.rows([0])


def test_rows_left_out_are_not_there(tmp_path):
    latents = make_store(tmp_path, progress=[1, 2, 1, 1, 2, 1])
    store = LatentStore.open(tmp_path)
    assert store.num_images == 4
    np.testing.assert_array_equal(store.labels, [0, 2, 0, 2])
    np.testing.assert_array_equal(store.rows([3, 0, 1]), latents[[5, 0, 2]])
    with pytest.raises(ValueError, match=r"has rows 0\.\.3, asked for 4\.\.4"):
        store.rows([4])
    make_store(tmp_path, progress=[2] * N)
    with pytest.raises(ValueError, match=r"every image of .* was left out"):
        LatentStore.open(tmp_path)


def test_row_arguments_are_checked(tmp_path):
    make_store(tmp_path)
    store = LatentStore.open(tmp_path)
    with pytest.raises(ValueError, match=r"has rows 0\.\.5, asked for -1\.\.2"):
        store.rows([2, -1])
    with pytest.raises(ValueError, match="has no mirrored latents: extract it with --flip"):
        store.rows([0], flip=np.array([True]))


@pytest.mark.parametrize(("size", "shape"), [(256, (1, C, S, S)), ("", (C, S, S))])
def test_published_layout(tmp_path, size, shape):
    """Files sort by number: 10.npy comes after 9.npy, not after 1.npy."""
    written = make_published(tmp_path, size, shape=shape)
    store = LatentStore.open(tmp_path)
    assert (store.num_images, store.latent_shape, store.num_classes) == (12, (C, S, S), 5)
    assert (store.codec, store.scale, store.meta["image_size"]) == ("sd-vae-ft-ema", 0.18215, 8 * S)
    np.testing.assert_array_equal(store.labels, np.arange(12) % 5)
    np.testing.assert_array_equal(store.rows([10, 2]), np.stack([written[10].reshape(C, S, S), written[2].reshape(C, S, S)]))


def test_published_layout_without_labels(tmp_path):
    make_published(tmp_path)
    for file in (tmp_path / "imagenet256_labels").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"12 latents, .*imagenet256_labels holds 0 labels"):
        LatentStore.open(tmp_path)
    (tmp_path / "imagenet256_labels").rmdir()
    with pytest.raises(ValueError, match="has no imagenet256_labels beside it"):
        LatentStore.open(tmp_path)
    store = LatentStore.open(tmp_path, labels_required=False)
    assert store.labels is None
    assert store.num_classes == 0
    assert len(store.rows([0, 11])) == 2


def test_published_layout_errors(tmp_path):
    make_published(tmp_path)
    features, labels = tmp_path / "imagenet256_features", tmp_path / "imagenet256_labels"
    np.save(features / "3.npy", np.zeros((2, C, S, S)))
    with pytest.raises(ValueError, match=r"3\.npy has shape \(2, 4, 2, 2\), latents are"):
        LatentStore.open(tmp_path).rows([3])
    np.save(features / "3.npy", np.zeros((C, 3, 3)))
    with pytest.raises(ValueError, match=r"3\.npy has shape \(4, 3, 3\), .*0\.npy has \(4, 2, 2\)"):
        LatentStore.open(tmp_path).rows([3])
    np.save(labels / "3.npy", np.array([1, 2]))
    with pytest.raises(ValueError, match=r"3\.npy has shape \(2,\), it must hold one label"):
        _ = LatentStore.open(tmp_path).labels
    (features / "x.npy").touch()
    with pytest.raises(ValueError, match=r"holds x\.npy: the files of this layout are numbered"):
        LatentStore.open(tmp_path)
    (features / "x.npy").unlink()
    (tmp_path / "imagenet512_features").mkdir()
    with pytest.raises(ValueError, match="holds imagenet256_features, imagenet512_features: keep one"):
        LatentStore.open(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="gone does not exist or is not a folder: make it with extract_features"):
        LatentStore.open(tmp_path / "gone")
    with pytest.raises(ValueError, match="is empty"):
        LatentStore.open(tmp_path)
    (tmp_path / "latents.npy").touch()
    with pytest.raises(ValueError, match=r"is no latent store, it has neither meta\.json nor"):
        LatentStore.open(tmp_path)
    (tmp_path / "imagenet_features").mkdir()
    with pytest.raises(ValueError, match=r"imagenet_features holds no \.npy files"):
        LatentStore.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "is unfinished .0 of 6 rows are missing.: run extract_features.py again to finish"),
        ({"progress": [1, 0, 1, 0, 1, 1]}, "is unfinished .2 of 6 rows are missing.: run extract_features.py again"),
        ({"shape": [N, C, 4, 4]}, r"latents.npy has shape \(6, 4, 2, 2\), but meta.json says \(6, 4, 4, 4\)"),
        ({"flip": True, "missing": "latents_flipped.npy"}, "latents_flipped.npy is missing: extract"),
        ({"class_names": ["a", "b"]}, r"labels.npy holds the label 2, but meta.json names 2 classes \(labels 0..1\)"),
        ({"format": 99}, "has format 99, this code reads 1"),
        ({"store": "images"}, "has store 'images': it must be latents or moments"),
        ({"missing": "latents.npy"}, "latents.npy is missing"),
        ({"missing": "labels.npy"}, "has no labels.npy"),
        ({"replace": ("labels.npy", np.zeros(N - 1, int))}, r"labels of shape \(5,\) for 6 latents"),
        ({"replace": ("labels.npy", np.zeros(N))}, "labels.npy holds float64, labels must be whole numbers"),
        ({"replace": ("labels.npy", np.full(N, -1))}, "holds the label -1, labels must be at least 0"),
        ({"replace": ("latents.npy", np.zeros((N, C, S)))}, r"has shape \(6, 4, 2\), latents are \(N, C, S, S\)"),
        ({"replace": ("latents.npy", np.zeros((N, C, 2, 3)))}, r"has shape \(6, 4, 2, 3\), latents are"),
        ({"replace": ("latents.npy", np.zeros((N, C, S, S), int))}, "holds int64, latents are floating-point"),
    ],
)
def test_store_errors(tmp_path, changes, message):
    changes = dict(changes)
    missing, (replaced, value) = changes.pop("missing", None), changes.pop("replace", (None, None))
    make_store(tmp_path, **changes)
    if missing:
        (tmp_path / missing).unlink(missing_ok=True)
    if replaced:
        np.save(tmp_path / replaced, value)
    with pytest.raises(ValueError, match=message) as error:
        LatentStore.open(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_files(tmp_path):
    make_store(tmp_path)
    whole = (tmp_path / "latents.npy").read_bytes()
    (tmp_path / "latents.npy").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"latents\.npy is not a whole \.npy file"):
        LatentStore.open(tmp_path)
    for text, message in (("{", r"meta\.json cannot be read"), ("3", r"meta\.json"), ('{"format": 1}', "lacks codec, scale")):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            LatentStore.open(tmp_path)


def test_labels_may_be_absent(tmp_path):
    make_store(tmp_path)
    (tmp_path / "labels.npy").unlink()
    store = LatentStore.open(tmp_path, labels_required=False)
    assert store.labels is None
    assert store.num_classes == 3


def test_without_class_names_the_labels_count(tmp_path):
    make_store(tmp_path, class_names=None)
    assert LatentStore.open(tmp_path).num_classes == 3
