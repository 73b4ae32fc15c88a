"""Where many samples go: a PNG folder, and one ``.npz`` that the evaluator reads. Both survive a kill and are filled by many
processes."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.npz import write_npz
from runtime.files import SharedRows, atomic_file, is_temporary, remove_temporaries, write_json
from runtime.locks import LOCK
from sampling.generate import Batch

SETTINGS = "settings.json"


def _png_name(image_id: int) -> str:
    return f"{image_id:06d}.png"


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {path.parent}, or use another --sample-dir") from error
    return settings


@dataclass(frozen=True)
class Table:
    """A ``.csv`` beside the images, one line an image. rows: the batch's values, (B, len(columns))."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Batch], np.ndarray]


class SampleFolder:
    """``<folder>/png/<i>.png`` and, when all are there, ``<folder>/samples_NxHxWx3.npz`` with arr_0 (images) and arr_1
    (labels), and ``<folder>/<table.name>``.

    Until then the images lie in ``<folder>/.samples.npy``, row by row, so that none is held in memory and none is made twice.
    settings: what the samples depend on; a folder with samples of other settings is refused.
    """

    def __init__(
        self,
        folder: Path,
        num_images: int,
        image_size: int,
        settings: dict,
        *,
        png: bool = True,
        table: Table | None = None,
    ):
        self.folder, self.num_images, self.image_size, self.png, self.table = folder, num_images, image_size, png, table
        self.settings = json.loads(json.dumps(settings))  # as they will be read back: tuples are lists
        self.npz_path = folder / f"samples_{num_images}x{image_size}x{image_size}x3.npz"
        self._images = SharedRows(folder / ".samples.npy", (num_images, image_size, image_size, 3), np.uint8)
        # The images come last: what marks one as made is written after all else about it.
        self._files = [self._images]
        if table:
            self._values = SharedRows(folder / ".table.npy", (num_images, len(table.columns)), np.float64)
            self._files.insert(0, self._values)

    def packed(self) -> bool:
        """Whether nothing is left to do. Raises ValueError when the folder holds anything but samples of the same settings."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--sample-dir {self.folder} is a file: name a folder")
        path = self.folder / SETTINGS
        if path.exists():
            there = _read_settings(path)
            different = [key for key in sorted(there.keys() | self.settings.keys()) if there.get(key) != self.settings.get(key)]
            if different:
                changes = ", ".join(f"{key} {there.get(key)} -> {self.settings.get(key)}" for key in different)
                raise ValueError(f"{self.folder} holds samples of other settings ({changes}): use another --sample-dir")
        elif self.folder.exists() and any(not (is_temporary(p.name) or p.name == LOCK) for p in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no samples of this script: use another --sample-dir")
        return self.npz_path.exists() and not any(file.exists() for file in self._files)

    def prepare(self) -> None:
        """Make the folder, or ready it to go on. Called by one process, which has locked the folder, before the others go on.

        Raises ValueError as :meth:`packed`, and when what is there is damaged.
        """
        if self.packed():
            return
        pictures = self.folder / "png"
        for folder in (self.folder, pictures):
            remove_temporaries(folder)
        write_json(self.settings, self.folder / SETTINGS)
        if self.png:
            pictures.mkdir(exist_ok=True)
        if self.npz_path.exists():
            return
        for file in self._files:
            file.create()
        if self.png:
            there = set(os.listdir(pictures))
            with self._images as images:
                for i in np.flatnonzero(images.progress() == SharedRows.WRITTEN).tolist():
                    if _png_name(i) not in there:
                        images.mark(i, SharedRows.MISSING)

    def progress(self) -> np.ndarray:
        """SharedRows.MISSING or WRITTEN per image, uint8 (N,)."""
        if self.npz_path.exists():
            return np.full(self.num_images, SharedRows.WRITTEN, np.uint8)
        return np.minimum.reduce([file.progress() for file in self._files])

    def complete(self) -> bool:
        """Whether every image has been written, by whatever process."""
        return bool((self.progress() == SharedRows.WRITTEN).all())

    def __enter__(self) -> "SampleFolder":
        self._stack = contextlib.ExitStack()
        for file in self._files:
            self._stack.enter_context(file)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def write(self, batch: Batch, missing: np.ndarray) -> None:
        """Write those of the batch's images that are ``missing``, bool (N,)."""
        rows = self.table.rows(batch) if self.table else None
        for k, (image_id, image) in enumerate(zip(batch.image_ids, batch.images.numpy(), strict=True)):
            if not missing[image_id]:
                continue
            if self.png:
                with atomic_file(self.folder / "png" / _png_name(image_id), durable=False) as file:
                    Image.fromarray(image).save(file, format="PNG")
            if rows is not None:
                self._values.write(image_id, rows[k])
            self._images.write(image_id, image)

    def finish(self, labels: np.ndarray) -> Path:
        """Pack the ``.npz``. Called by one process when nothing is missing any more. labels: (N,)."""
        if not self.npz_path.exists():
            if self.table:
                self._write_table(labels)
            write_npz(self.npz_path, {"arr_0": self._images.array(), "arr_1": labels})
        for file in self._files:
            file.remove()
        return self.npz_path

    def _write_table(self, labels: np.ndarray) -> None:
        with atomic_file(self.folder / self.table.name) as file:
            file.write((",".join(["image", "label", *self.table.columns]) + "\n").encode())
            for i, (label, values) in enumerate(zip(labels, self._values.array(), strict=True)):
                file.write((",".join([str(i), str(label), *(f"{value:.10g}" for value in values)]) + "\n").encode())

    def read_table(self) -> np.ndarray:
        """The finished table without image number and label, (N, len(columns))."""
        return np.loadtxt(self.folder / self.table.name, delimiter=",", skiprows=1, ndmin=2)[:, 2:]
