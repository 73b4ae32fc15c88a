"""The features of all images of a batch: shared out to all processes, kept between runs."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
from runtime.distributed import gather_rows, my_share, note
from runtime.files import file_sha256

LAYERS = tuple(field.name for field in fields(Features))
SHOWN = 10  # positions that a message lists


@dataclass(frozen=True)
class Side:
    """One of the two files, on the main process: its features, None where it has no images, and their statistics."""

    path: str
    rows: Sequence[int]  # positions in the file of the images measured
    features: Features | None
    statistics: Statistics
    constant: Sequence[int] = ()  # positions of the images that are of one colour throughout

    @property
    def num_images(self) -> int:
        return len(self.rows)


def load_samples(path: str, rows: Sequence[int], extractor: Extractor, batch_size: int, state: PartialState) -> Side | None:
    """All of a file of generated images, or its ``rows``. None on other processes than the main one."""
    extracted = extract(path, rows, extractor, batch_size, state)
    if extracted is None:
        return None
    features, constant = extracted
    return Side(path, rows, features, compute_statistics(path, features, {}), constant)


def load_reference(
    path: str, num_images: int, extractor: Extractor, batch_size: int, state: PartialState, cache: str | None
) -> Side | None:
    """A reference: of its features the pooled ones, and the statistics it carries, or those of its images.

    cache: a folder; a reference with the same bytes is then measured once for each extractor.
    """
    kept = None
    if cache and num_images:
        paths = [_cache_path(cache, path, extractor) if state.is_main_process else None]
        kept = Path(broadcast_object_list(paths)[0])
        loaded = [_read_cache(kept, path, num_images) if state.is_main_process else None]
        # Only whether there is something is told the others: the features stay where they are needed.
        if broadcast_object_list([loaded[0] is not None])[0]:
            return loaded[0]
    statistics = carried_statistics(path, extractor.statistics, has_images=num_images > 0)
    if not num_images:
        return Side(path, (), None, statistics) if state.is_main_process else None
    extracted = extract(path, range(num_images), extractor, batch_size, state)
    if extracted is None:
        return None
    features, constant = extracted
    statistics = compute_statistics(path, features, statistics)
    side = Side(path, range(num_images), Features(features.pool), statistics, constant)
    if kept:
        _write_cache(kept, side)
    return side


def compute_statistics(path: str, features: Features, carried: Statistics) -> Statistics:
    """The ``carried`` statistics, and those of the layers that it lacks."""
    layers = {layer: getattr(features, layer) for layer in STATISTICS if layer not in carried}
    num_images, dimensions = features.pool.shape
    if "pool" in layers and num_images <= dimensions:
        note(
            f"{path}: {num_images} images for {dimensions} features, whose covariance they cannot determine. FID is biased "
            "upwards; compare it only with FIDs of as many images (published ones take 50,000)"
        )
    return carried | {layer: mean_covariance(values) for layer, values in layers.items() if values is not None}


def extract(
    path: str, rows: Sequence[int], extractor: Extractor, batch_size: int, state: PartialState
) -> tuple[Features, list[int]] | None:
    """Features of the images at ``rows`` of ``path``, and positions of those that are of one colour; None on other processes.

    Batches are cut before they are shared out, so that an image is always measured in the same company and the features have
    the same bytes whatever the number of processes. Memory holds three batches of images. Raises ValueError naming the file
    and the first image with a non-finite feature.
    """
    starts = my_share(range(0, len(rows), batch_size), state)
    mine = rows[starts[0] : starts[-1] + batch_size] if starts else []
    layers: dict[str, np.ndarray] = {}
    constant: list[int] = []
    shown = state.is_main_process and len(mine) > 0
    progress = tqdm(total=len(mine), desc=os.path.basename(path), unit=" images", disable=not shown, file=sys.stderr)
    done = 0
    with progress:
        for images in read_ahead(read_batches(path, "arr_0", batch_size, mine)):
            positions = mine[done : done + len(images)]
            constant += [position for position, image in zip(positions, images, strict=True) if (image == image[0, 0]).all()]
            for layer, values in vars(extractor(images)).items():
                if values is None:
                    continue
                _require_finite(values, path, positions, layer)
                if layer not in layers:
                    layers[layer] = np.empty((len(mine), *values.shape[1:]), np.float32)
                layers[layer][done : done + len(values)] = values
            done += len(images)
            progress.update(len(images))
    gathered = {layer: gather_rows(layers.get(layer), state) for layer in LAYERS}
    constant = gather_object(constant)
    if not state.is_main_process:
        return None
    _report_constant(path, constant)
    return Features(**gathered), constant


def _require_finite(values: np.ndarray, path: str, positions: Sequence[int], layer: str) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path}: image {positions[int(bad.argmax())]} has a non-finite {layer} feature: remove or generate it again"
        )


def _report_constant(path: str, positions: Sequence[int]) -> None:
    if positions:
        shown = ", ".join(map(str, positions[:SHOWN])) + (", ..." if len(positions) > SHOWN else "")
        note(
            f"{path}: {len(positions)} image(s) of one colour throughout, at {shown}. A NaN in a sampler or decoder ends as "
            "such an image: look at them before trusting the numbers"
        )


def _cache_path(folder: str, path: str, extractor: Extractor) -> str:
    key = hashlib.sha256(f"{file_sha256(path)} {extractor.fingerprint}".encode()).hexdigest()
    return str(Path(folder, f"{key[:32]}.npz"))


def _write_cache(kept: Path, side: Side) -> None:
    arrays = {"pool": side.features.pool, "constant": np.asarray(side.constant, np.int64)}
    for layer, (mu, sigma) in side.statistics.items():
        mu_key, sigma_key = STATISTICS[layer]
        arrays |= {mu_key: mu, sigma_key: sigma}
    write_npz(kept, arrays)


def _read_cache(kept: Path, path: str, num_images: int) -> Side | None:
    if not kept.exists():
        return None
    try:
        keys = npz_keys(kept)
        statistics = {
            layer: (read_array(kept, mu_key), read_array(kept, sigma_key))
            for layer, (mu_key, sigma_key) in STATISTICS.items()
            if mu_key in keys
        }
        constant = read_array(kept, "constant").tolist()
        features = Features(read_array(kept, "pool"))
    except ValueError as error:
        note(f"{error}; it is made anew")
        return None
    _report_constant(path, constant)
    return Side(path, range(num_images), features, statistics, constant)
