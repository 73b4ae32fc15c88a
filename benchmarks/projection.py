"""From measured times to what was not measured: power laws, and the time of long runs on many processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TRAINING_STEPS, TRAINING_BATCH = 400_000, 256  # of the published runs on ImageNet
SAMPLES, SAMPLING_STEPS = 50_000, 250
GUIDED = 2  # forwards of a guided step: with the label and without
# Of a training step's arithmetic the way back has two thirds; meanwhile the gradients that are ready can be exchanged.
BACKWARD_SHARE = 2 / 3
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class PowerLaw:
    """seconds = constant * size^exponent, fitted from ``low`` to ``high``; error: the largest relative error there."""

    exponent: float
    constant: float
    low: float
    high: float
    error: float

    def __call__(self, size: float) -> float:
        return self.constant * size**self.exponent


def fit_power(seconds: Mapping[float, float]) -> PowerLaw:
    """Least squares in logarithms. seconds: by size. Raises ValueError for fewer than two sizes."""
    if len(seconds) < 2:
        raise ValueError(f"a power law needs two sizes or more, got {list(seconds)}")
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    exponent, constant = np.polyfit(np.log(sizes), np.log(times), 1)
    law = PowerLaw(float(exponent), math.exp(constant), float(sizes.min()), float(sizes.max()), 0.0)
    error = max(abs(law(size) / time - 1) for size, time in seconds.items())
    return PowerLaw(law.exponent, law.constant, law.low, law.high, float(error))


@dataclass(frozen=True)
class CallCost:
    """Seconds of a call on a batch: fixed + per_image * batch."""

    fixed: float
    per_image: float

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> "CallCost":
        """Least squares, relative errors counting alike; neither part is negative. seconds: by batch."""
        batches, times = np.array(list(seconds), float), np.array(list(seconds.values()))
        if len(batches) > 1:
            system = np.stack([1 / times, batches / times], axis=1)
            (fixed, per_image), *_ = np.linalg.lstsq(system, np.ones(len(times)), rcond=None)
            if fixed > 0 and per_image > 0:
                return cls(float(fixed), float(per_image))
        return cls(0.0, float(np.mean(times / batches)))

    def __call__(self, batch: float) -> float:
        return self.fixed + self.per_image * batch


@dataclass(frozen=True)
class TrainingProjection:
    """cost: of a training step's arithmetic in one process. gradient_bytes: that all processes sum up in a step. link: bytes a
    second that each process sends."""

    cost: CallCost
    gradient_bytes: float
    link: float
    batch: int = TRAINING_BATCH
    steps: int = TRAINING_STEPS

    def exchange_seconds(self, processes: int) -> float:
        """Ring all-reduce: each process sends 2 (P-1)/P times the gradient (Patarasuk & Yuan 2009)."""
        return 2 * (processes - 1) / processes * self.gradient_bytes / self.link

    def step_seconds(self, processes: int) -> float:
        """The arithmetic of batch/P images, and what the way back does not hide of the exchange."""
        work = self.cost(self.batch / processes)
        return work + max(self.exchange_seconds(processes) - BACKWARD_SHARE * work, 0.0)

    def efficiency(self, processes: int) -> float:
        """The time of one process over P times that of P."""
        return self.step_seconds(1) / (processes * self.step_seconds(processes))

    def hours(self, processes: int) -> float:
        return self.steps * self.step_seconds(processes) / 3600


def sampling_hours(seconds_per_image: float, processes: int, *, samples: int = SAMPLES, steps: int = SAMPLING_STEPS) -> float:
    """Guided sampling, decoding not counted. seconds_per_image: of a forward in a full batch. Nothing is exchanged: the longest
    share counts."""
    return math.ceil(samples / processes) * steps * GUIDED * seconds_per_image / 3600
