"""The latent store: a folder of encoded images that training reads memory-mapped.

    meta.json              codec, scale, image size, shape, dtype, kind, flip, source, class names
    latents.npy            (N, C, S, S) scaled latents, or for kind "moments" (N, 2C, S, S): mean, then log-variance, unscaled
    latents_flipped.npy    the same of the mirrored images, when made with --flip
    labels.npy             int64 (N,)
    latents.progress       one byte a row (runtime.files.SharedRows): while extraction runs, and afterwards if images were left
                           out

Row i is image i of the image folder. The published layout, one file per image in ``imagenet256_features/`` and
``imagenet256_labels/``, is read as well.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.codec import sample_posterior
from runtime.files import SharedRows

FORMAT = 1
META, LATENTS, FLIPPED, LABELS = "meta.json", "latents.npy", "latents_flipped.npy", "labels.npy"
PUBLISHED_CODEC, PUBLISHED_SCALE, PUBLISHED_DOWNSAMPLE = "sd-vae-ft-ema", 0.18215, 8
MOST_CLASSES = 10**6  # a label beyond it is a mistake, and would take memory
AGAIN = "run extract_features.py again to finish"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# What meta.json must hold, and what it may: how an entry is checked, and what is said of another one.
REQUIRED = {
    "format": (lambda value: value == FORMAT, f", this code reads {FORMAT}"),
    "codec": (lambda value: isinstance(value, str) and value, ": it must be a codec's name"),
    "scale": (lambda value: type(value) in (int, float) and 0 < value < math.inf, ": it must be a number above 0"),
    "image_size": (_is_whole, ": it must be a number of pixels"),
    "store": (lambda value: value in ("latents", "moments"), ": it must be latents or moments"),
    "flip": (lambda value: isinstance(value, bool), ": it must be true or false"),
    "shape": (
        lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_whole, value)),
        ": it must be four sizes (N, C, S, S)",
    ),
}
OPTIONAL = {
    "class_names": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        ": it must be a list of names",
    ),
}

LabelReader = Callable[[], np.ndarray | None]  # called once, when labels are first wanted


class Rows(Protocol):
    """Anything that yields rows by position: a memory map, or a list of files."""

    def __getitem__(self, positions: np.ndarray) -> np.ndarray: ...


class LatentStore:
    """Latents and labels by row, whatever the layout on disk. Made by :meth:`open`.

    meta: dict as in meta.json. num_images: the rows there are, without the images left out by --skip-bad.
    labels: np.int64 (num_images,), None where a store without labels was allowed. latent_shape: (C, S, S).
    codec, scale: what the latents were made with. has_flip: mirrored latents are there.
    needs_noise: the store holds moments, so :meth:`rows` draws from the posterior. provenance: see data.sources.Source.
    """

    def __init__(
        self, path: Path, meta: dict, latents: Rows, flipped: Rows | None, labels: LabelReader, written: np.ndarray | None
    ):
        self.path, self.meta = path, meta
        self._latents, self._flipped, self._labels, self._written = latents, flipped, labels, written
        self.codec, self.scale = meta["codec"], float(meta["scale"])
        self.needs_noise, self.has_flip = meta["store"] == "moments", flipped is not None
        channels, *sides = meta["shape"][1:]
        self.latent_shape = (channels // 2 if self.needs_noise else channels, *sides)
        self.num_images = meta["shape"][0] if written is None else len(written)
        self.provenance = {"kind": meta["store"], "codec": self.codec, "flip": self.has_flip}
        self.provenance |= {name: meta[name] for name in ("seed", "listing") if name in meta}

    @classmethod
    def open(cls, path: str | os.PathLike, labels_required: bool = True) -> "LatentStore":
        """Read a store of either layout. Raises ValueError naming the path, what is wrong with it, and the mend."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"the latent store {path} does not exist or is not a folder: make it with extract_features.py")
        if (path / META).exists():
            return _open_store(path, labels_required)
        features = sorted(path.glob("*_features"))
        if features:
            return _open_published(path, features, labels_required)
        if not any(path.iterdir()):
            raise ValueError(f"the latent store {path} is empty: make it with extract_features.py")
        raise ValueError(
            f"{path} is no latent store, it has neither {META} nor imagenet*_features: make one with extract_features.py"
        )

    def __len__(self) -> int:
        return self.num_images

    @cached_property
    def labels(self) -> np.ndarray | None:
        labels = self._labels()
        return labels if labels is None or self._written is None else labels[self._written]

    @property
    def image_size(self) -> int:
        """Side of the encoded images, in pixels."""
        return self.meta["image_size"]

    @property
    def class_names(self) -> list[str] | None:
        return self.meta.get("class_names")

    @cached_property
    def num_classes(self) -> int:
        """From the class names; where a store has none, the highest label plus one; 0 without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def rows(self, indices: Sequence[int], flip: np.ndarray | None = None, noise: Tensor | None = None) -> Tensor:
        """Scaled latents ready for training, float32 (B, C, S, S).

        indices: positions below num_images, in any order. flip: bool (B,), take the mirrored image.
        noise: standard normal (B, C, S, S), which a store of moments needs and other stores ignore.
        Raises ValueError when an argument does not fit the store.
        """
        positions = np.asarray(indices, np.int64).reshape(-1)
        if len(positions) and not (positions.min() >= 0 and positions.max() < self.num_images):
            raise ValueError(f"{self.path} has rows 0..{self.num_images - 1}, asked for {positions.min()}..{positions.max()}")
        flip = np.zeros(len(positions), bool) if flip is None else np.asarray(flip, bool)
        if flip.any() and not self.has_flip:
            raise ValueError(f"{self.path} has no mirrored latents: extract it with --flip, or train without flips")
        values = torch.from_numpy(self._read(positions if self._written is None else self._written[positions], flip))
        if not self.needs_noise:
            return values
        if noise is None:
            raise ValueError(f"{self.path} holds moments: rows() needs noise of shape {(len(positions), *self.latent_shape)}")
        mean, logvar = values.chunk(2, dim=1)
        return self.scale * sample_posterior(mean, logvar, noise.to(mean))

    def _read(self, positions: np.ndarray, flip: np.ndarray) -> np.ndarray:
        values = np.empty((len(positions), *self.meta["shape"][1:]), np.float32)
        for source, chosen in ((self._latents, ~flip), (self._flipped, flip)):
            (where,) = np.nonzero(chosen)
            if len(where):
                where = where[np.argsort(positions[where], kind="stable")]  # a disk prefers ascending reads
                values[where] = source[positions[where]]
        return values


def _checked_labels(labels: np.ndarray, path: Path, num_classes: int | None) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path} holds {labels.dtype}, labels must be whole numbers: extract the store again")
    if not labels.size:
        raise ValueError(f"{path} holds no labels: extract the store again")
    if labels.min() < 0:
        raise ValueError(f"{path} holds the label {labels.min()}, labels must be at least 0: extract the store again")
    if num_classes is not None and labels.max() >= num_classes:
        raise ValueError(
            f"{path} holds the label {labels.max()}, but {META} names {num_classes} classes (labels 0..{num_classes - 1}): "
            "extract the store again, or mend class_names"
        )
    if labels.max() >= MOST_CLASSES:
        raise ValueError(f"{path} holds the label {labels.max()}, labels must be below {MOST_CLASSES}: extract the store again")
    return labels.astype(np.int64)


def read_meta(path: Path) -> dict:
    """meta.json of the store at ``path``. Raises ValueError when it cannot be understood."""
    try:
        meta = json.loads((path / META).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / META} cannot be read ({error}): extract the store again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path / META} holds a {type(meta).__name__}, not a store's entries: extract the store again")
    missing = [key for key in REQUIRED if key not in meta]
    if missing:
        raise ValueError(f"{path / META} lacks {', '.join(missing)}: extract the store again")
    for key, (holds, wanted) in {**REQUIRED, **OPTIONAL}.items():
        if key in meta and not holds(meta[key]):
            raise ValueError(f"{path / META} has {key} {meta[key]!r:.100}{wanted}; extract the store again")
    if meta["store"] == "moments" and meta["shape"][1] % 2:
        raise ValueError(f"{path / META} has moments of {meta['shape'][1]} channels, which is odd: extract the store again")
    return meta


def _open_store(path: Path, labels_required: bool) -> LatentStore:
    meta = read_meta(path)
    shape = tuple(meta["shape"])
    progress_path = path / Path(LATENTS).with_suffix(".progress")
    progress = np.fromfile(progress_path, np.uint8) if progress_path.exists() else None
    missing = 0 if progress is None else int((progress == SharedRows.MISSING).sum())
    if missing or not meta.get("complete", True):
        raise ValueError(f"the extraction of {path} is unfinished ({missing} of {shape[0]} rows are missing): {AGAIN}")
    written = None
    if progress is not None and (progress != SharedRows.WRITTEN).any():
        written = np.flatnonzero(progress == SharedRows.WRITTEN)
        if not len(written):
            raise ValueError(f"every image of {path} was left out: look at the image folder and extract again")

    latents = _array(path / LATENTS, shape)
    flipped = _array(path / FLIPPED, shape) if meta["flip"] else None
    labels_path = path / LABELS
    labels = None
    if labels_path.exists():
        labels = _load(labels_path)
        if labels.shape != shape[:1]:
            raise ValueError(
                f"{labels_path} holds labels of shape {labels.shape} for {shape[0]} latents: extract the store again"
            )
        class_names = meta.get("class_names")
        labels = _checked_labels(labels, labels_path, None if class_names is None else len(class_names))
    elif labels_required:
        raise ValueError(f"{path} has no {LABELS}: extract the store again")
    return LatentStore(path, meta, latents, flipped, lambda: labels, written)


def _load(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: extract the store again") from None
    except OSError:
        raise
    except Exception as error:  # of a damaged header, from TokenError to a MemoryError for what it claims
        raise ValueError(f"{path} is not a whole .npy file ({error}): extract the store again") from error


def _array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    array = _load(path, mmap_mode="r")
    if array.ndim != 4 or array.shape[2] != array.shape[3]:
        raise ValueError(f"{path} has shape {array.shape}, latents are (N, C, S, S): extract the store again")
    if array.shape != shape:
        raise ValueError(f"{path} has shape {array.shape}, but {META} says {shape}: extract the store again")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype}, latents are floating-point: extract the store again")
    return array


class FileRows:
    """One latent per file, (1, C, S, S) or (C, S, S), all of one shape."""

    def __init__(self, files: list[str]):
        self.files = files
        self.shape = _squeezed(files[0]).shape

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        rows = np.empty((len(positions), *self.shape), np.float32)
        for k, position in enumerate(positions):
            row = _squeezed(self.files[position])
            if row.shape != self.shape:
                raise ValueError(
                    f"{self.files[position]} has shape {row.shape}, {self.files[0]} has {self.shape}: extract it again"
                )
            rows[k] = row
        return rows


def _squeezed(file: str) -> np.ndarray:
    latent = _load(Path(file))
    latent = latent[0] if latent.ndim == 4 and len(latent) == 1 else latent
    if latent.ndim != 3 or latent.shape[1] != latent.shape[2]:
        raise ValueError(f"{file} has shape {latent.shape}, latents are (1, C, S, S) or (C, S, S): extract it again")
    return latent


def _open_published(path: Path, features: list[Path], labels_required: bool) -> LatentStore:
    """``<name>_features/<i>.npy`` and ``<name>_labels/<i>.npy``; latents are already scaled. Labels are read on first use."""
    if len(features) > 1:
        raise ValueError(f"{path} holds {', '.join(folder.name for folder in features)}: keep one of them per folder")
    labels_folder = path / features[0].name.replace("_features", "_labels")
    numbers = _numbered(features[0])
    if not numbers:
        raise ValueError(f"{features[0]} holds no .npy files: extract the features again")
    label_files: list[str] = []
    if labels_folder.is_dir():
        label_numbers = _numbered(labels_folder)
        if numbers != label_numbers:
            raise ValueError(
                f"{features[0]} holds {len(numbers)} latents, {labels_folder} holds {len(label_numbers)} labels, "
                "or their names differ: every latent needs the label of the same file name; extract the features again"
            )
        label_files = [os.path.join(labels_folder, f"{number}.npy") for number in label_numbers]
    elif labels_required:
        raise ValueError(f"{features[0]} has no {labels_folder.name} beside it: extract the features again")

    latents = FileRows([os.path.join(features[0], f"{number}.npy") for number in numbers])
    meta = {
        "format": "published",
        "codec": PUBLISHED_CODEC,
        "scale": PUBLISHED_SCALE,
        "image_size": latents.shape[-1] * PUBLISHED_DOWNSAMPLE,
        "store": "latents",
        "flip": False,
        "shape": [len(numbers), *latents.shape],
        "num_images": len(numbers),
    }

    def read_labels() -> np.ndarray | None:
        if not label_files:
            return None
        return _checked_labels(np.array([_one_label(file) for file in label_files]), labels_folder, None)

    return LatentStore(path, meta, latents, None, read_labels, None)


def _one_label(file: str) -> int:
    label = _load(Path(file))
    if label.size != 1:
        raise ValueError(f"{file} has shape {label.shape}, it must hold one label: extract the features again")
    return label.item()


def _numbered(folder: Path) -> list[int]:
    """The numbers n of the files n.npy, ascending."""
    with os.scandir(folder) as entries:
        stems = [entry.name[: -len(".npy")] for entry in entries if entry.name.endswith(".npy")]
    named = [stem for stem in stems if not (stem.isdecimal() and str(int(stem)) == stem)]
    if named:
        raise ValueError(f"{folder} holds {named[0]}.npy: the files of this layout are numbered 0.npy, 1.npy, ...")
    return sorted(map(int, stems))
