"""``--ema-profiles``: averages of the weights from which one of any length is made afterwards (training.posthoc_ema).

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", sections 3.1-3.2 and appendix C: after
step t the average weighs the weights of step tau in proportion to tau^gamma. Its length sigma_rel is the standard deviation of
that profile as a share of the steps so far.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.checkpoints.build import check_shapes
from models.checkpoints.files import write_safetensors
from runtime.files import atomic_file

FOLDER = "ema_profiles"  # in a run's folder
PROFILE = "ema_profile"  # entry of a snapshot's config
MAX_SIGMA_REL = 12**-0.5  # that of the plain mean, gamma = 0
MIN_SIGMA_REL = 1e-3  # 0.1 % of the steps, which no snapshots resolve
MAX_HALF = 65504.0


def sigma_rels(text: str) -> tuple[float, ...]:
    """An argparse type: "0.10,0.05" -> (0.05, 0.1)."""
    try:
        lengths = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths: write for example 0.05,0.10") from None
    for length in lengths:
        if not MIN_SIGMA_REL <= length < MAX_SIGMA_REL:
            raise argparse.ArgumentTypeError(
                f"{length:g} is no sigma_rel: it is a share of the training, from {MIN_SIGMA_REL:g} to below "
                f"{MAX_SIGMA_REL:.4g}, that of the plain mean"
            )
    if len({f"{length:g}" for length in lengths}) < len(lengths):
        raise argparse.ArgumentTypeError(f"{text} names a length twice")
    return lengths


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile from its length: the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1."""
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def update_share(step: int, gamma: float) -> float:
    """1 - beta, what the weights after step 1, 2, ... contribute: beta = (1 - 1/step)^(gamma + 1)."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


class Profiles:
    """Of a network's trained weights, one average for each length; updated after every step, also after one that was skipped,
    so that they are functions of (step, weights after each step)."""

    def __init__(self, network: nn.Module, lengths: Sequence[float]):
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._network, self._names, self._weights = network, trained.keys(), list(trained.values())
        self.averages = {
            length: {name: parameter.detach().clone() for name, parameter in trained.items()} for length in lengths
        }
        self._gammas = {length: gamma_of(length) for length in lengths}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: steps done, this one included."""
        for length, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), self._weights, update_share(step, self._gammas[length]))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {f"{length:g}": self._network.state_dict() | average for length, average in self.averages.items()}

    @torch.no_grad()
    def load(self, states: dict[str, dict[str, Tensor]], path: str | os.PathLike) -> None:
        """Raises ValueError, naming ``path``, for averages that are not there or do not fit."""
        for length, average in self.averages.items():
            if not isinstance(states.get(f"{length:g}"), dict):
                raise ValueError(f"{path} lacks its average of --ema-profiles {length:g}")
            check_shapes(self._network, states[f"{length:g}"], path)
            for name, value in average.items():
                value.copy_(states[f"{length:g}"][name])

    def save(self, run_folder: Path, step: int, config: dict) -> None:
        """A snapshot of each average, a checkpoint by itself; of one that is not finite none, which would spoil every sum that
        it is part of. config: of the run's checkpoints."""
        for (length, average), state in zip(self.averages.items(), self.state_dict().values(), strict=True):
            if not torch.stack([value.isfinite().all() for value in average.values()]).all():
                continue
            about = config | {PROFILE: {"sigma_rel": length}}
            with atomic_file(snapshot_path(run_folder, step, length)) as file:
                stored = {name: _halved(value) if name in self._names else value.cpu() for name, value in state.items()}
                write_safetensors(stored, file.name, which="ema", config=about, step=step)


def _halved(value: Tensor) -> Tensor:
    """In float16, half the disk: what that rounds off, up to 2^-11 of a weight, is an eighth of what bf16 sampling does. What
    float16 does not hold stays as it is."""
    return value.cpu() if value.abs().max() > MAX_HALF else value.half().cpu()


@dataclass(frozen=True)
class Snapshot:
    """The average of length sigma_rel after a step, in a file."""

    path: Path
    step: int
    sigma_rel: float
    config: dict  # as in the run's checkpoints


def snapshot_path(run_folder: Path, step: int, sigma_rel: float) -> Path:
    return run_folder / FOLDER / f"{step:07d}-{sigma_rel:g}.safetensors"


def snapshot_files(run_folder: Path) -> list[tuple[int, Path]]:
    """A run's snapshots with their steps, oldest first."""
    paths = (run_folder / FOLDER).glob("*.safetensors")
    return sorted((int(match[1]), path) for path in paths if (match := re.match(r"(\d+)-", path.name)))


def read_snapshot(path: Path) -> Snapshot:
    """What a snapshot's header says. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        config = json.loads(header["config"])
        return Snapshot(path, int(header["step"]), float(config.pop(PROFILE)["sigma_rel"]), config)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no snapshot of --ema-profiles, or damaged ({error!r}): remove it") from error
