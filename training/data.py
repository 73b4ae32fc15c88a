"""Which images a step sees and everything that is drawn for it: a pure function of (seed, step), computed one step ahead."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.sources import Source
from runtime.ahead import read_ahead
from runtime.draws import Purpose, generator, normals, uniforms


class MaskPlace(Protocol):
    """A place of a network's masked pass: so many tokens, of which a share ~ U(low, high) per pass is dropped."""

    num_tokens: int
    low: float
    high: float

    def kept(self, uniforms: Tensor, share: float) -> Tensor:
        """U(0, 1) draws (b, num_tokens) -> what the network takes for the tokens that are kept, (b, ...)."""


@dataclass
class Batch:
    """One process's share of a step, b samples; P passes (1 unmasked, and if wanted 1 masked), each with noise of its own."""

    x0: Tensor  # (b, C, S, S)
    y: Tensor  # (P, b) int64, null labels where dropped
    noise: Tensor  # (P, b, C, S, S)
    kept: list[Tensor]  # (b, ...) for each mask place: the tokens that are kept; empty without a masked pass

    def pin(self) -> "Batch":
        return self._map(pinned)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: to_device(tensor, device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(change(self.x0), change(self.y), change(self.noise), [change(kept) for kept in self.kept])

    def slice(self, start: int, stop: int) -> "Batch":
        part = slice(start, stop)
        return Batch(self.x0[part], self.y[:, part], self.noise[:, part], [kept[part] for kept in self.kept])


def pinned(tensor: Tensor) -> Tensor:
    """In memory that a GPU copies from by itself; an image source's latents are on the device already."""
    return tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On CUDA without waiting: for what is not pinned the copy would begin only when the device has done all its work."""
    return pinned(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DataOrder:
    """An endless order of the images: one permutation after another, each a function of (seed, epoch)."""

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: generator(seed, Purpose.DATA_ORDER, epoch).permutation(num_images)
        )

    def indices(self, step: int) -> np.ndarray:
        """The images of a step's global batch, int64 (batch_size,). An epoch that ends inside a batch is continued by the
        next."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = positions // self.num_images, positions % self.num_images
        indices = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = self._permutation(epoch)[offsets[epochs == epoch]]
        return indices

    def num_steps(self, epochs: float) -> int:
        """Steps that make up a number of epochs, at least 1."""
        return max(1, int(epochs * self.num_images // self.batch_size))


class Batches:
    """Makes this process's :class:`Batch` of any step from a latent store, or another source of latents.

    share: the positions in the global batch that are this process's. label_dropout: the probability of a null label.
    mask_places: None for one unmasked pass; else a second, masked pass is drawn for these places.
    """

    def __init__(
        self,
        source: Source,
        order: DataOrder,
        share: Sequence[int],
        *,
        null_label: int,
        label_dropout: float = 0.1,
        mask_places: Sequence[MaskPlace] | None = None,
    ):
        self.source, self.order, self.share = source, order, share
        self.null_label, self.label_dropout, self.mask_places = null_label, label_dropout, mask_places
        self.passes = [(Purpose.NOISE, Purpose.LABEL_DROP)]
        if mask_places is not None:
            self.passes.append((Purpose.NOISE_MASKED, Purpose.LABEL_DROP_MASKED))

    def __call__(self, step: int) -> Batch:
        source, seed, share, shape = self.source, self.order.seed, self.share, self.source.latent_shape
        indices = self.order.indices(step)[share.start : share.stop]
        flip = uniforms(seed, Purpose.FLIP, share, step).numpy() < 0.5 if source.has_flip else None
        posterior = normals(seed, Purpose.LATENT, share, step, shape) if source.needs_noise else None
        x0 = source.rows(indices, flip, posterior)
        labels = torch.from_numpy(source.labels[indices])
        noise = torch.stack([normals(seed, purpose, share, step, shape) for purpose, _ in self.passes])
        dropped = torch.stack([uniforms(seed, purpose, share, step) for _, purpose in self.passes]) < self.label_dropout
        return Batch(x0, torch.where(dropped, self.null_label, labels), noise, self._kept(step))

    def _kept(self, step: int) -> list[Tensor]:
        if self.mask_places is None:
            return []
        sizes = [place.num_tokens for place in self.mask_places]
        ratios = uniforms(self.order.seed, Purpose.MASK_RATIO, [0], step, (len(sizes),))[0].tolist()
        tokens = uniforms(self.order.seed, Purpose.MASK_TOKENS, self.share, step, (sum(sizes),)).split(sizes, dim=1)
        return [
            place.kept(u, place.low + (place.high - place.low) * ratio)
            for u, place, ratio in zip(tokens, self.mask_places, ratios, strict=True)
        ]

    def ahead(self, start: int, stop: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for start <= step < stop, each ready to be moved to the device.

        Unless that is the CPU, a thread makes the next batch while the caller works on this one; on a CPU the two would fight
        for the cores, and lose a quarter of the speed.
        """
        batches = ((step, self(step)) for step in range(start, stop))
        if device.type == "cuda":
            batches = ((step, batch.pin()) for step, batch in batches)
        return batches if device.type == "cpu" else read_ahead(batches)
