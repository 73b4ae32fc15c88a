"""The part of ``benchmarks.run`` about memory in training: what gradient checkpointing trades for time, and how large a batch
fits."""

import copy
import dataclasses
import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.compare import System
from benchmarks.networks import LEARNING_RATE, fresh_accelerator, limits, randomized, training_batch, training_step
from benchmarks.rows import Row, row_of
from benchmarks.timing import Case, measure, peak_memory
from models.registry import build_network
from training.step import TrainingStep

RECOMPUTED = ", recomputed"
PEAKS = 3
FIRST = "fp32"  # what the others' speed is compared with


@dataclass(frozen=True)
class Need:
    """A training step's memory, a straight line through two measured batches: ``held`` between steps (weights, average,
    optimizer), and at its peak ``fixed`` (gradients) and ``per_image`` bytes more."""

    held: int
    fixed: float
    per_image: float

    @classmethod
    def through(cls, held: int, peaks: dict[int, int]) -> "Need":
        """peaks: by batch, two of them."""
        (small, low), (large, high) = sorted(peaks.items())
        slope = (high - low) / (large - small)
        return cls(held, low - slope * small, slope)

    def largest_batch(self, memory: float) -> int:
        """0 where not even one image fits. Raises ValueError where memory was not seen to grow with the batch."""
        if self.per_image <= 0:
            raise ValueError(f"memory was not seen to grow with the batch: {self.per_image:.0f} bytes an image")
        return max(int((memory - self.held - self.fixed) // self.per_image), 0)


def memory_rows(
    args: Namespace, system: System, batch_sizes: Sequence[int], device: torch.device
) -> tuple[list[Row], list[str]]:
    """batch_sizes: two. Not compiled: what is saved then depends on the compiler as well."""
    network = randomized(build_network(system.config))
    steps = {
        precision + suffix: training_step(
            copy.deepcopy(network),
            1,
            fresh_accelerator(precision),
            system.optimizer,
            gradient_checkpointing=bool(suffix),
            **system.recipe,
        )
        for precision in ("fp32", "bf16")
        for suffix in ("", RECOMPUTED)
    }
    calls = {batch: {path: _call(step, system, batch) for path, step in steps.items()} for batch in sorted(batch_sizes)}
    large = max(calls)
    cases = [Case(path, call, large, None if path == FIRST else FIRST) for path, call in calls[large].items()]
    results = measure(cases, device=device, **limits(args))
    rows, lines = [], []
    for result in results:
        path = result.name
        peaks = {batch: _peak(by_path[path], device) for batch, by_path in calls.items()}
        need = Need.through(held_bytes(steps[path]), peaks)
        row = row_of(result, "memory", system.label, path, saved_bytes=need.per_image if need.per_image > 0 else None)
        rows.append(dataclasses.replace(row, peak_bytes=peaks[large]))
        lines.append(_line(system.label, path, need, args.memory_gb))
    return rows, lines


def _call(step: TrainingStep, system: System, batch_size: int) -> Callable[[], object]:
    batch = training_batch(system.config, batch_size, masked=system.masked)
    sized = dataclasses.replace(step, global_batch_size=batch_size, share=range(batch_size), micro_batch_size=batch_size)
    return lambda: sized(0, batch, LEARNING_RATE)


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The median of some: the process's own memory, which is looked at where there is no GPU, is not only this call's."""
    return statistics.median(peak_memory(call, device) for _ in range(PEAKS))


def held_bytes(step: TrainingStep) -> int:
    """Weights, their average, and the optimizer's state."""
    states = (value for state in step.optimizer.state.values() for value in state.values())
    return sum(_bytes(tensor) for module in (step.model, step.ema.model) for tensor in _tensors(module)) + sum(
        _bytes(value) for value in states if isinstance(value, torch.Tensor)
    )


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _line(label: str, path: str, need: Need, memory_gb: Sequence[float]) -> str:
    if need.per_image <= 0:
        return f"- {label}, {path}: too small for its growth with the batch to be seen in this process's memory"
    # By what this device's kernels keep: another device's differ.
    fits = ", ".join(f"{size:g} GB hold {need.largest_batch(size * 1e9)}" for size in memory_gb)
    return (
        f"- {label}, {path}: {need.held / 1e9:.2f} GB held, {need.fixed / 1e6:.0f} MB more in a step and "
        f"{need.per_image / 1e6:.1f} MB an image; projected, with this device's kernels, {fits} images"
    )
