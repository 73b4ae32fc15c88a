"""The features of all images of a batch: shared out to all processes, kept between runs."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from data.npz import npz_keys, read_array, read_batches, write_npz
from evaluations.batches import STATISTICS, Statistics, carried_statistics
from evaluations.features import Extractor, Features
from evaluations.metrics import mean_covariance
from runtime.ahead import read_ahead
from runtime.distributed import gather_rows, my_share, note, together
from runtime.files import file_sha256

LAYERS = tuple(field.name for field in fields(Features))
CACHE_VERSION = 1  # raise it with any change to what an extractor computes, or old references stay in use
SHOWN = 10  # positions that a message lists


@dataclass(frozen=True)
class Side:
    """One of the two files, on the main process: its features, None where it has no images, and their statistics."""

    path: str
    num_images: int
    features: Features | None
    statistics: Statistics
    constant: Sequence[int] = ()  # positions of the images that are of one colour throughout


def load_samples(path: str, rows: Sequence[int], extractor: Extractor, batch_size: int, state: PartialState) -> Side | None:
    """All of a file of generated images, or its ``rows``. None on other processes than the main one."""
    extracted = extract(path, rows, extractor, batch_size, state)
    if extracted is None:
        return None
    features, constant = extracted
    return _complete(Side(path, len(features.pool), features, {}, constant), carried={})


def side_of(path: str, features: Features, constant: Sequence[int]) -> Side:
    """The generated images whose features these are, called ``path`` in messages, with statistics of every layer; says
    which are of one colour."""
    note_one_colour(path, constant)
    return _with_statistics(Side(path, len(features.pool), features, {}, constant))


def load_reference(
    path: str, num_images: int, extractor: Extractor, batch_size: int, state: PartialState, cache: str | None
) -> Side | None:
    """A reference: of its features the pooled ones, and the statistics it carries, or those of its images.

    cache: a folder; a reference with the same bytes is then measured once for each extractor.
    """
    with together():
        carried = carried_statistics(path, extractor.statistics, has_images=num_images > 0)
    if not num_images:
        return Side(path, 0, None, carried) if state.is_main_process else None
    kept, side = None, None
    if cache:
        if state.is_main_process:
            kept = Path(cache, _cache_name(path, extractor))
            side = _read_cache(kept, path, num_images, carried)
        # Only whether there is something is told the others: the features stay where they are needed.
        if broadcast_object_list([side is not None])[0]:
            return side and _complete(side, carried)
    extracted = extract(path, range(num_images), extractor, batch_size, state)
    if extracted is None:
        return None
    features, constant = extracted
    side = _complete(Side(path, num_images, features, carried, constant), carried)
    side = replace(side, features=Features(features.pool))
    if kept:
        try:
            _write_cache(kept, side, carried)
        except OSError as error:
            note(f"{error}. The numbers do not need it")
    return side


def _complete(side: Side, carried: Statistics) -> Side:
    """``side`` with the statistics that it lacks, and with what there is to say about its images."""
    note_one_colour(side.path, side.constant)
    if "pool" not in carried:
        note_small_set(side.path, *side.features.pool.shape)
    return _with_statistics(side)


def _with_statistics(side: Side) -> Side:
    layers = {layer: getattr(side.features, layer) for layer in STATISTICS if layer not in side.statistics}
    computed = {layer: mean_covariance(values) for layer, values in layers.items() if values is not None}
    return replace(side, statistics=side.statistics | computed)


def note_one_colour(path: str, constant: Sequence[int]) -> None:
    """constant: positions of the images that are of one colour throughout."""
    if constant:
        shown = ", ".join(map(str, constant[:SHOWN])) + (", ..." if len(constant) > SHOWN else "")
        note(
            f"{path}: {len(constant)} image(s) of one colour throughout, at {shown}. A NaN in a sampler or decoder "
            "ends as such an image: look at them before trusting the numbers"
        )


def note_small_set(path: str, num_images: int, dimensions: int) -> None:
    if num_images <= dimensions:
        note(
            f"{path}: {num_images} images for {dimensions} features, whose covariance they cannot determine. FID is biased "
            "upwards; compare it only with FIDs of as many images (published ones take 50,000)"
        )


def extract(
    path: str, rows: Sequence[int], extractor: Extractor, batch_size: int, state: PartialState
) -> tuple[Features, list[int]] | None:
    """Features of the images at ``rows`` of ``path``, and positions of those that are of one colour; None on other processes.

    Batches are cut before they are shared out, so that an image is always measured in the same company and the features have
    the same bytes whatever the number of processes. Memory holds two batches of images. Raises ValueError naming the file
    and the first image with a non-finite feature.
    """
    starts = my_share(range(0, len(rows), batch_size), state)
    mine = rows[starts[0] : starts[-1] + batch_size] if starts else []
    found = FeatureRows(len(mine))
    shown = state.is_main_process and len(mine) > 0
    progress = tqdm(total=len(mine), desc=os.path.basename(path), unit=" images", disable=not shown, file=sys.stderr)
    with together(), progress:
        batches = read_ahead(read_batches(path, "arr_0", batch_size, mine))
        for values, of_one_colour in extract_batches(batches, mine, lambda row: f"{path}: image {row}", extractor, progress):
            found.add(values, of_one_colour)
    return found.gather(state)


class FeatureRows:
    """The features of this process's images, as they come; count: how many images there will be."""

    def __init__(self, count: int):
        self._count, self._done = count, 0
        self._layers: dict[str, np.ndarray] = {}
        self._constant: list[int] = []

    def add(self, layers: dict[str, np.ndarray], constant: Sequence[int]) -> None:
        """What :func:`extract_batches` yields of the next images."""
        stop = self._done + len(layers["pool"])
        for layer, rows in layers.items():
            if layer not in self._layers:
                self._layers[layer] = np.empty((self._count, *rows.shape[1:]), np.float32)
            self._layers[layer][self._done : stop] = rows
        self._constant += constant
        self._done = stop

    def gather(self, state: PartialState) -> tuple[Features, list[int]] | None:
        """Those of all processes, in their order, on the main process; None on others. Called once, by all."""
        gathered = {layer: gather_rows(self._layers.pop(layer, None), state) for layer in LAYERS}
        constant = gather_object(self._constant)
        return (Features(**gathered), constant) if state.is_main_process else None


def extract_batches(
    batches: Iterable[np.ndarray], positions: Sequence[int], name: Callable[[int], str], extractor: Extractor, progress: tqdm
) -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
    """Yield the layers (B, D) of every batch of images (B, H, W, 3), and the positions of its images of one colour throughout.

    positions: of all images in turn. name: what a message calls the image at a position. Raises ValueError naming the first
    image with a non-finite feature.
    """
    done = 0
    for images in batches:
        here = positions[done : done + len(images)]
        layers = {layer: values for layer, values in vars(extractor(images)).items() if values is not None}
        for layer, values in layers.items():
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                raise ValueError(f"{name(here[int(bad.argmax())])} has a non-finite {layer} feature: remove or make it again")
        done += len(images)
        progress.update(len(images))
        yield layers, [position for position, image in zip(here, images, strict=True) if (image == image[0, 0]).all()]


def _cache_name(path: str, extractor: Extractor) -> str:
    key = f"{CACHE_VERSION} {extractor.fingerprint} {file_sha256(path)}"
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def _write_cache(kept: Path, side: Side, carried: Statistics) -> None:
    arrays = {"pool": side.features.pool, "constant": np.asarray(side.constant, np.int64)}
    for layer, (mu_key, sigma_key) in STATISTICS.items():
        if layer in side.statistics and layer not in carried:
            arrays[mu_key], arrays[sigma_key] = side.statistics[layer]
    write_npz(kept, arrays)


def _read_cache(kept: Path, path: str, num_images: int, carried: Statistics) -> Side | None:
    if not kept.exists():
        return None
    try:
        keys = npz_keys(kept)
        computed = {
            layer: (read_array(kept, mu_key), read_array(kept, sigma_key))
            for layer, (mu_key, sigma_key) in STATISTICS.items()
            if mu_key in keys
        }
        features, constant = Features(read_array(kept, "pool")), read_array(kept, "constant").tolist()
    except ValueError as error:
        note(f"{error}; it is made anew")
        return None
    return Side(path, num_images, features, computed | carried, constant)
