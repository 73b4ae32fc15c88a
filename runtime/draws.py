"""Randomness as a function: every draw is determined by (seed, purpose, index, step), never by what was drawn before.

Philox (Salmon et al. 2011) is a counter-based generator: its key is (seed, purpose), its counter starts at (0, index, step,
0), so that each sample of each step has a stream of 2^64 blocks of its own. Draws therefore do not depend on the number of
processes, on the batch size, on the device, or on a restart.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every published result: never reuse or renumber one."""

    DATA_ORDER = 1  # index: epoch
    TIMESTEP = 2  # index 0: one draw of the global batch
    NOISE = 3  # index, as of all training draws below: position in the global batch
    NOISE_MASKED = 4  # the masked prediction's own noise and label dropout
    LABEL_DROP = 5
    LABEL_DROP_MASKED = 6
    MASK_RATIO = 7  # one per pass: index 0
    MASK_TOKENS = 8
    LATENT = 9  # posterior sample of a stored mean and log-variance; also the encoder's, by image index
    FLIP = 10
    SAMPLE_LABEL = 20  # index: image number
    SAMPLE_NOISE = 21  # step 0: initial noise, step k: the noise added after solver step k
    METRIC_SUBSET = 30
    METRIC_RESAMPLE = 31  # index: resample; step 0: of a bootstrap, 1 and 2: reference and generated images of a subset


def generator(seed: int, purpose: Purpose, index: int = 0, step: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, purpose], np.uint64), counter=[0, index, step, 0]))


def subset(seed: int, available: int, count: int) -> np.ndarray:
    """``count`` of ``available`` positions (all, where there are fewer), without replacement, ascending."""
    return np.sort(generator(seed, Purpose.METRIC_SUBSET).permutation(available)[:count])


def _positioned(seed: int, purpose: Purpose, indices: Sequence[int], step: int) -> Iterator[np.random.Generator]:
    """:func:`generator` for one index after another; setting a counter is 7 times faster than making a Philox."""
    stream = generator(seed, purpose, 0, step)
    fresh = stream.bit_generator.state
    for index in indices:
        fresh["state"]["counter"] = np.array([0, index, step, 0], np.uint64)
        stream.bit_generator.state = fresh
        yield stream


def uniforms(seed: int, purpose: Purpose, indices: Sequence[int], step: int = 0, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """U(0, 1) float32, (len(indices), *shape): row k belongs to ``indices[k]``."""
    rows = np.empty((len(indices), *shape), np.float32)
    for k, stream in enumerate(_positioned(seed, purpose, indices, step)):
        rows[k] = stream.random(shape, dtype=np.float32)
    return torch.from_numpy(rows)


def normals(seed: int, purpose: Purpose, indices: Sequence[int], step: int = 0, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """N(0, 1) float32, (len(indices), *shape): row k belongs to ``indices[k]``."""
    rows = np.empty((len(indices), *shape), np.float32)
    for k, stream in enumerate(_positioned(seed, purpose, indices, step)):
        rows[k] = stream.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(rows)
