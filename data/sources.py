"""What training can read from: a latent store (data.store), a folder of images encoded on the fly, or dummy data."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from data.codec import Codec
from data.images import ImageFolder, load_image
from data.store import PUBLISHED_CODEC, PUBLISHED_DOWNSAMPLE, PUBLISHED_SCALE
from runtime.draws import Purpose, normals


@runtime_checkable
class Source(Protocol):
    """Latents and labels by row: what training needs. LatentStore, ImageSource and DummySource are such sources."""

    num_images: int
    num_classes: int
    labels: np.ndarray | None  # int64 (num_images,)
    class_names: list[str] | None
    codec: str  # its name, as load_codec takes it
    scale: float  # by which latents are multiplied
    image_size: int  # side in pixels
    latent_shape: tuple[int, int, int]  # (C, S, S)
    has_flip: bool  # rows() can mirror
    needs_noise: bool  # rows() draws from a posterior
    provenance: dict  # plain values that tell these data from others of the same size

    def rows(self, indices: Sequence[int], flip: np.ndarray | None = None, noise: Tensor | None = None) -> Tensor:
        """Scaled latents, float32 (B, C, S, S), on any device.

        indices: positions below num_images, in any order. flip: bool (B,), mirror the image; only where has_flip.
        noise: standard normal (B, C, S, S), required where needs_noise and ignored elsewhere.
        Raises ValueError when an argument does not fit the source.
        """
        ...


class ImageSource:
    """A folder of images (see data.images), each read, centre-cropped and encoded whenever it is asked for.

    image_size: side of the crop in pixels. codec: encodes on its own device, where the rows stay.
    num_workers: threads that read images; 0 reads in the calling thread. flip: whether rows may be mirrored.
    Raises ValueError when the folder cannot be used or the image size does not fit the codec.
    """

    def __init__(self, path: str | os.PathLike, image_size: int, codec: Codec, num_workers: int = 4, flip: bool = True):
        if num_workers < 0:
            raise ValueError(f"num_workers {num_workers} must be at least 0, which reads in the calling thread")
        self.image_size, self.latent_shape = image_size, codec.latent_shape(image_size)
        self.encoder, self.codec, self.scale = codec, codec.name, codec.scale
        self.needs_noise, self.has_flip = codec.stochastic, flip
        self.images = ImageFolder(path)
        self.path, self.num_images = self.images.path, len(self.images)
        self.labels, self.class_names = self.images.labels, self.images.class_names
        self.num_classes = len(self.class_names)
        self.provenance = {"kind": "images", "codec": self.codec, "listing": self.images.digest()}
        # Threads suffice: Pillow lets go of the interpreter's lock while it decodes and resizes.
        self._map = ThreadPoolExecutor(num_workers, thread_name_prefix="images").map if num_workers else map

    def __len__(self) -> int:
        return self.num_images

    def rows(self, indices: Sequence[int], flip: np.ndarray | None = None, noise: Tensor | None = None) -> Tensor:
        """As :meth:`Source.rows`. Raises ValueError also for an image that cannot be read: the first one of the batch."""
        positions = _checked_positions(indices, self.num_images, self.path)
        flip = np.zeros(len(positions), bool) if flip is None else np.asarray(flip, bool)
        if flip.shape != positions.shape:
            raise ValueError(f"flip has shape {flip.shape}, but {len(positions)} rows were asked for: give one flag a row")
        if flip.any() and not self.has_flip:
            raise ValueError(f"{self.path} was opened with flip=False: open it with flip=True, or train without flips")
        shape = (len(positions), *self.latent_shape)
        if self.needs_noise and (noise is None or noise.shape != shape):
            given = None if noise is None else tuple(noise.shape)
            raise ValueError(f"noise is {given}: codec {self.codec} has a posterior, rows() needs normals of shape {shape}")
        if not len(positions):
            return torch.empty(shape)
        images = np.stack(list(self._map(self._read, positions.tolist(), flip)))  # (B, H, W, 3)
        return self.encoder.encode(torch.from_numpy(images), noise if self.needs_noise else None)

    def _read(self, position: int, mirrored: bool) -> np.ndarray:
        image = load_image(self.images.paths[position], self.image_size)
        return image[:, ::-1] if mirrored else image


class DummySource:
    """Random latents for tests of speed: no files, no VAE, and no memory beyond the labels.

    Row i is standard normal and a function of i alone (Purpose.LATENT at seed 0), its label is i modulo num_classes.
    codec, image_size: what a run on such latents would name. latent_shape: (C, S, S), for a codec with a geometry of its own;
    None: 3 channels of full size for ``pixels``, else the Stable Diffusion VAE's 4 channels, an eighth of the size.
    Raises ValueError for a size that does not fit.
    """

    class_names, has_flip, needs_noise = None, False, False

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        latent_shape: tuple[int, int, int] | None = None,
        image_size: int = 256,
        codec: str = PUBLISHED_CODEC,
    ):
        for name, value in (("num_images", num_images), ("num_classes", num_classes), ("image_size", image_size)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        channels, downsample, self.scale = (3, 1, 1.0) if codec == "pixels" else (4, PUBLISHED_DOWNSAMPLE, PUBLISHED_SCALE)
        if latent_shape is None and image_size % downsample:
            raise ValueError(f"--image-size {image_size} must be a multiple of {downsample}, the downsampling of codec {codec}")
        self.latent_shape = latent_shape or (channels, image_size // downsample, image_size // downsample)
        self.num_images, self.num_classes, self.image_size, self.codec = num_images, num_classes, image_size, codec
        self.labels = np.arange(num_images, dtype=np.int64) % num_classes
        self.provenance = {"kind": "dummy"}

    def __len__(self) -> int:
        return self.num_images

    def rows(self, indices: Sequence[int], flip: np.ndarray | None = None, noise: Tensor | None = None) -> Tensor:
        """As :meth:`Source.rows`, on the CPU."""
        positions = _checked_positions(indices, self.num_images, "dummy data")
        if flip is not None and np.any(flip):
            raise ValueError("dummy data has no mirrored rows: train without flips")
        return normals(0, Purpose.LATENT, positions, shape=self.latent_shape)


def _checked_positions(indices: Sequence[int], num_images: int, source: str) -> np.ndarray:
    positions = np.asarray(indices, np.int64).reshape(-1)
    if len(positions) and not (positions.min() >= 0 and positions.max() < num_images):
        raise ValueError(f"{source} has rows 0..{num_images - 1}, asked for {positions.min()}..{positions.max()}")
    return positions
