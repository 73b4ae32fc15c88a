"""Where many samples go: a PNG folder, and one ``.npz`` that the evaluator reads. Both survive a kill and are filled by many
processes."""

import contextlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.npz import write_npz
from runtime.files import SharedRows, atomic_file, write_json

SETTINGS = "settings.json"


class SampleFolder:
    """``<folder>/png/<i>.png`` and, when all are there, ``<folder>/samples_NxHxWx3.npz`` with arr_0 (images) and arr_1
    (labels).

    Until then the images lie in ``<folder>/.samples.npy``, row by row, so that none is held in memory and none is made twice.
    settings: what the samples depend on; a folder with samples of other settings is refused.
    """

    def __init__(self, folder: Path, num_images: int, image_size: int, settings: dict, *, png: bool = True):
        self.folder, self.num_images, self.image_size, self.settings, self.png = folder, num_images, image_size, settings, png
        self.npz_path = folder / f"samples_{num_images}x{image_size}x{image_size}x3.npz"
        self._rows = SharedRows(folder / ".samples.npy", (num_images, image_size, image_size, 3), np.uint8)

    def prepare(self) -> None:
        """Make the folder, or recognise it as one to continue. Called by one process before the others go on.

        Raises ValueError when it holds samples of other settings.
        """
        path = self.folder / SETTINGS
        if path.exists():
            there = json.loads(path.read_text())
            different = [key for key in sorted(there.keys() | self.settings.keys()) if there.get(key) != self.settings.get(key)]
            if different:
                changes = ", ".join(f"{key} {there.get(key)} -> {self.settings.get(key)}" for key in different)
                raise ValueError(f"{self.folder} holds samples of other settings ({changes}): use another --sample-dir")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no samples of this script: use another --sample-dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, path)
        if not self.npz_path.exists():
            self._rows.create()
        if self.png:
            (self.folder / "png").mkdir(exist_ok=True)

    def missing(self) -> list[int]:
        """The images that are still to be made."""
        if self.npz_path.exists():
            return []
        missing = self._rows.progress() != SharedRows.WRITTEN
        if self.png:
            missing |= ~np.isin(np.arange(self.num_images), [int(path.stem) for path in (self.folder / "png").glob("*.png")])
        return np.flatnonzero(missing).tolist()

    def complete(self) -> bool:
        """Whether every image has been written, by whatever process."""
        return self.npz_path.exists() or bool((self._rows.progress() == SharedRows.WRITTEN).all())

    def __enter__(self) -> "SampleFolder":
        self._stack = contextlib.ExitStack()
        if not self.npz_path.exists():
            self._stack.enter_context(self._rows)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def write(self, image_id: int, image: np.ndarray) -> None:
        """image (H, W, 3) uint8."""
        if self.png:
            with atomic_file(self.folder / "png" / f"{image_id:06d}.png", durable=False) as file:
                Image.fromarray(image).save(file, format="PNG")
        self._rows.write(image_id, image)

    def finish(self, labels: np.ndarray) -> Path:
        """Pack the ``.npz``. Called by one process when nothing is missing any more. labels: (N,)."""
        if not self.npz_path.exists():
            write_npz(self.npz_path, {"arr_0": self._rows.array(), "arr_1": labels})
        self._rows.remove()
        return self.npz_path
