"""Writing a latent store (see data.store) from any number of processes, restartable."""

import contextlib
import io
from pathlib import Path

import numpy as np

from data import store
from data.codec import Codec
from data.images import ImageFolder
from runtime.files import SharedRows, atomic_file, remove_temporaries, write_json

# What must be equal for an extraction to go on in a folder, and the flag that sets it.
SETTING_FLAGS = {
    "codec": "--vae",
    "scale": "--vae",
    "image_size": "--image-size",
    "store": "--store",
    "dtype": "--dtype",
    "flip": "--flip",
    "seed": "--seed",
    "num_images": "--data-path",
    "class_names": "--data-path",
    "listing": "--data-path",
}


def describe(images: ImageFolder, codec: Codec, image_size: int, *, kind: str, dtype: str, flip: bool, seed: int) -> dict:
    """meta.json of the store these settings make; ``complete`` is false until every row is there.

    Raises ValueError when the image side does not fit the codec, or moments are asked of a codec that has none.
    """
    channels, *sides = codec.latent_shape(image_size)
    if kind == "moments" and not codec.stochastic:
        raise ValueError(f"--store moments: codec {codec.name} has no posterior to draw from; use --store latents")
    return {
        "format": store.FORMAT,
        "complete": False,
        "codec": codec.name,
        "scale": codec.scale,
        "image_size": image_size,
        "store": kind,
        "shape": [len(images), channels * (2 if kind == "moments" else 1), *sides],
        "dtype": dtype,
        "flip": flip,
        "seed": seed,
        "num_images": len(images),
        "source": images.path,
        "listing": images.digest(),
        "class_names": images.class_names,
    }


class StoreWriter:
    """One process calls :meth:`prepare`, all open the writer (``with``) and write rows, then one calls :meth:`finish`."""

    def __init__(self, path: str, meta: dict):
        self.path, self.meta = Path(path), meta
        names = [store.LATENTS, store.FLIPPED] if meta["flip"] else [store.LATENTS]
        self.arrays = [SharedRows(self.path / name, tuple(meta["shape"]), np.dtype(meta["dtype"])) for name in names]
        self._open = contextlib.ExitStack()

    def complete(self) -> bool:
        """Whether nothing is left to do. Raises ValueError when the folder holds anything but a store of the same settings,
        naming those that differ."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--features-path {self.path} is a file: name a new folder")
        if not (self.path / store.META).exists():
            if (self.path / store.LATENTS).exists():
                raise ValueError(
                    f"--features-path {self.path} holds {store.LATENTS} without {store.META}: remove it or use a new folder"
                )
            return False
        try:
            existing = store.read_meta(self.path)
        except ValueError as error:
            raise ValueError(f"--features-path: {error}; remove {self.path} first, or use a new folder") from error
        self._refuse_other_settings(existing)
        return bool(existing.get("complete", True))

    def prepare(self, labels: np.ndarray) -> None:
        """Make what :meth:`complete` does not find. Called while the folder is locked. Raises ValueError as that does."""
        if self.complete():
            return
        remove_temporaries(self.path)
        write_json(self.meta, self.path / store.META)
        content = io.BytesIO()  # numpy's own writing to a disk does not say why it failed
        np.save(content, labels)
        with atomic_file(self.path / store.LABELS) as file:
            file.write(content.getbuffer())
        for array in self.arrays:
            array.create()

    def _refuse_other_settings(self, existing: dict) -> None:
        differing = [key for key in SETTING_FLAGS if existing.get(key) != self.meta[key]]
        if not differing:
            return
        shown = [
            f"{SETTING_FLAGS[key]} ({key} {existing.get(key)}, now {self.meta[key]})"
            if key not in ("class_names", "listing")
            else f"{SETTING_FLAGS[key]} (other {'class names' if key == 'class_names' else 'files'})"
            for key in differing
        ]
        raise ValueError(
            f"--features-path {self.path} was begun with other settings: {'; '.join(shown)}. "
            "Give the same settings to go on, or a new folder"
        )

    def __enter__(self) -> "StoreWriter":
        for array in self.arrays:
            self._open.enter_context(array)
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def write(self, row: int, values: list[np.ndarray]) -> None:
        """values: the row of latents.npy and, with flip, of latents_flipped.npy."""
        # latents.npy last: its progress map stands for the whole row
        for array, value in reversed(list(zip(self.arrays, values, strict=True))):
            array.write(row, value)

    def leave_out(self, row: int) -> None:
        for array in reversed(self.arrays):
            array.mark(row, SharedRows.LEFT_OUT)

    def progress(self) -> np.ndarray:
        """SharedRows.MISSING, WRITTEN or LEFT_OUT per row, uint8 (N,): of the array that has least."""
        return np.minimum.reduce([array.progress() for array in self.arrays])

    def finish(self) -> np.ndarray:
        """Declare the store complete; the rows that were left out. Raises ValueError when rows are missing."""
        progress = self.progress()
        missing = int((progress == SharedRows.MISSING).sum())
        if missing:
            raise ValueError(f"{missing} of {len(progress)} rows of {self.path} are missing: {store.AGAIN}")
        left_out = np.flatnonzero(progress == SharedRows.LEFT_OUT)
        if len(left_out) == len(progress):
            raise ValueError(f"none of the {len(progress)} images could be read: nothing to store in {self.path}")
        write_json({**self.meta, "complete": True, "num_left_out": len(left_out)}, self.path / store.META)
        # Only now: a store that is complete is never prepared again, one without a map would be.
        for array in self.arrays:
            if array is not self.arrays[0] or not len(left_out):
                array.progress_path.unlink(missing_ok=True)
        return left_out
