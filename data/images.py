"""Image folders: which images there are, and how one becomes a square RGB array."""

import hashlib
import os

import numpy as np
from PIL import Image


def image_extensions() -> frozenset[str]:
    """The lower-case extensions, with the dot, of every format this Pillow can read."""
    extensions = Image.registered_extensions()  # this also loads the plugins that fill Image.OPEN
    return frozenset(extension for extension, name in extensions.items() if name in Image.OPEN)


class ImageFolder:
    """The images of ``path/<class>/**/<file>``, listed without opening any of them.

    Classes are the sub-folders of ``path`` in sorted order; the images of a class, at any depth below it, are sorted by path.
    Names that start with a dot are left alone. Raises ValueError naming the folder when nothing usable is there.

    paths: the files, list of str. labels: np.int64 (N,), positions in class_names. class_names: list of str.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.exists(self.path):
            raise ValueError(f"the image folder {self.path} does not exist: check the path")
        if not os.path.isdir(self.path):
            raise ValueError(f"{self.path} is not a folder: pass the folder that holds one sub-folder per class")
        extensions = image_extensions()
        with os.scandir(self.path) as entries:
            self.class_names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
        if not self.class_names:
            found = "images lie directly in it" if _has_images(self.path, extensions) else "it is empty"
            raise ValueError(
                f"{self.path} has no class sub-folders ({found}): arrange the images as {self.path}/<class>/<image>"
            )

        per_class = [sorted(_images_below(os.path.join(self.path, name), extensions)) for name in self.class_names]
        self.paths = [file for files in per_class for file in files]
        counts = [len(files) for files in per_class]
        if not self.paths:
            raise ValueError(
                f"no images in the {len(counts)} class sub-folder(s) of {self.path}: nothing there has an image extension"
            )
        if 0 in counts:
            empty = self.class_names[counts.index(0)]
            raise ValueError(f"class sub-folder {os.path.join(self.path, empty)} holds no images: fill it or remove it")
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """A fingerprint of the listing: equal for the same relative paths in the same order, wherever the folder lies."""
        listing, start = hashlib.sha256(), len(os.path.join(self.path, ""))
        for file in self.paths:
            listing.update(os.fsencode(file[start:]) + b"\0")
        return listing.hexdigest()[:16]


def _is_image(entry: os.DirEntry, extensions: frozenset[str]) -> bool:
    return not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in extensions


def _has_images(path: str, extensions: frozenset[str]) -> bool:
    with os.scandir(path) as entries:
        return any(_is_image(entry, extensions) for entry in entries)


def _images_below(path: str, extensions: frozenset[str]) -> list[str]:
    files, folders = [], [path]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if _is_image(entry, extensions) and not _is_folder(entry):
                    files.append(entry.path)
                elif not entry.name.startswith(".") and _is_folder(entry):
                    folders.append(entry.path)
    return files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: an image like others, for its reader to refuse
        return False


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: an RGB image of size x size pixels.

    Halve with a box filter while the smaller side is at least 2 * size, resize bicubically to a smaller side of size, cut out
    the middle.
    """
    image = _to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """The centre crop of the (first frame of the) image at ``path``: uint8 (size, size, 3), RGB.

    As in the published protocol an alpha channel is dropped, and an EXIF orientation is not applied.
    Raises ValueError naming the file when it is missing, corrupt, truncated or too large.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # nobody may ever write into a pipe
            raise ValueError("it is no file")
        with Image.open(path) as image:
            return np.array(center_crop(image, size))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise anything from SyntaxError to struct.error on damaged data
        raise ValueError(f"cannot read the image {os.fspath(path)}: {error}; replace or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Of 16 bits the upper 8 are kept, which is also what Pillow does itself for colour images."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range, save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # greyscale; convert() would clip at 255 instead of scaling
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
