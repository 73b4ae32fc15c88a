"""Make an average of the weights of any length, after training, from the snapshots of ``--ema-profiles``.

    python -m training.posthoc_ema RUN --sigma-rel 0.15 --out ema-0.15.safetensors
    python -m training.posthoc_ema RUN --sigma-rel 0.06,0.09,0.12 --step 300000 --out "ema-{}.safetensors"

What is written is a checkpoint that every sampling script loads. docs/posthoc_ema.md says how it is made.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoints.files import write_safetensors
from runtime import cli
from runtime.distributed import note
from runtime.files import atomic_file, check_writable, save_atomic
from training.profiles import PROFILE, Snapshot, gamma_of, read_snapshot, sigma_rels, snapshot_files

SUFFIXES = (".safetensors", ".pt")
SMALLEST = 1e-14  # singular values of the normalized products below this share of the largest are rounding
POOR = 0.05  # a profile that far from the wanted one is told of


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder, <results>/<index>-<model>, trained with --ema-profiles")
    parser.add_argument(
        "--sigma-rel", type=sigma_rels, required=True, metavar="LENGTH[,LENGTH...]", help="as a share of the training; 0.15"
    )
    parser.add_argument(
        "--step", type=cli.positive_int, help="as it would have been after this step (default: the last stored)"
    )
    parser.add_argument(
        "--out", required=True, help="a .safetensors or .pt to write; of several lengths with {} in the place of the length"
    )
    parser.add_argument("--force", action=cli.BooleanFlag, help="replace existing files")
    args = parser.parse_args(argv)
    if len(args.sigma_rel) > 1 and "{}" not in args.out:
        parser.error(f"--out {args.out} is one file for {len(args.sigma_rel)} lengths: put {{}} where the length is to stand")
    if not args.out.endswith(SUFFIXES):
        parser.error(f"--out {args.out} must end in {' or '.join(SUFFIXES)}: that is what is written")
    args.out = [Path(args.out.replace("{}", f"{length:g}")) for length in args.sigma_rel]
    for out in args.out:
        if out.is_file() and not args.force:
            parser.error(f"{out} exists: choose another name, or replace it with --force")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    for out in args.out:
        check_writable(out)
    snapshots = find_snapshots(args.run)
    step = args.step or snapshots[-1].step
    mend = _check_step(step, snapshots, args.run)
    solved = [solve(snapshots, step, length) for length in args.sigma_rel]
    for length, (_, error) in zip(args.sigma_rel, solved, strict=True):
        if error > POOR:
            note(
                f"--sigma-rel {length:g} at step {step}: {len(snapshots)} snapshots come no nearer than {error:.0%} to its "
                f"profile. {mend}"
            )
    states = combine(snapshots, [weights for weights, _ in solved])
    for out, length, state, (_, error) in zip(args.out, args.sigma_rel, states, solved, strict=True):
        config = snapshots[-1].config | {PROFILE: {"sigma_rel": length}}
        if out.suffix == ".pt":
            save_atomic({"ema": state, "config": config, "step": step}, out)
        else:
            with atomic_file(out) as file:
                write_safetensors(state, file.name, which="ema", config=config, step=step)
        print(f"{out}: {config['model']} after step {step}, sigma_rel {length:g}, within {error:.2g} of its profile")


def _check_step(step: int, snapshots: Sequence[Snapshot], run_folder: Path) -> str:
    """-> what brings a profile of that step nearer. Raises ValueError for a step that lies outside the stored ones."""
    first, last = snapshots[0].step, snapshots[-1].step
    if step > last:
        raise ValueError(f"--step {step}: the last snapshot of {run_folder} is of step {last}; give at most that")
    if step < first:
        raise ValueError(f"--step {step}: the first snapshot of {run_folder} is of step {first}; give at least that")
    below = max(snapshot.step for snapshot in snapshots if snapshot.step <= step)
    above = min(snapshot.step for snapshot in snapshots if snapshot.step >= step)
    if below != above:  # the profile ends at the step, which none of the stored ones does
        return f"--step {below} or {above}, which are stored, do"
    return "More of them do (--ema-profile-every), or a length between the stored ones"


def find_snapshots(run_folder: Path) -> list[Snapshot]:
    """All of a run's, oldest first. Raises ValueError where there is none, or where they are not of one model: what else a
    config says (paths, names, settings that came later) may differ within a run."""
    snapshots = [read_snapshot(path) for _, path in snapshot_files(run_folder)]
    if not snapshots:
        raise ValueError(f"{run_folder} holds no snapshots, ema_profiles/*.safetensors: a run with --ema-profiles stores them")
    for other in snapshots[1:]:
        if not _same_model(snapshots[0].config, other.config):
            raise ValueError(f"{other.path} is of another model than {snapshots[0].path}: remove what is not of this run")
    return snapshots


def _same_model(config: dict, other: dict) -> bool:
    settings, others = (held.get("model_config", {}) for held in (config, other))
    return config["model"] == other["model"] and all(settings[name] == others[name] for name in settings.keys() & others)


def products(step: np.ndarray, gamma: np.ndarray, other_step: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """Inner products of profiles, which broadcast. A profile is (gamma + 1) tau^gamma / step^(gamma + 1), 0 <= tau <= step."""
    first, last = np.minimum(step, other_step), np.maximum(step, other_step)
    of_later = np.where(step < other_step, other_gamma, gamma)
    return (gamma + 1) * (other_gamma + 1) * (first / last) ** of_later / ((gamma + other_gamma + 1) * last)


def solve(snapshots: Sequence[Snapshot], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """-> (weights of the snapshots, float64 (N,), of sum 1, with the profile that is nearest to the wanted one in least
    squares; its distance from that as a share of the norm)."""
    for k, snapshot in enumerate(snapshots):
        if (snapshot.step, snapshot.sigma_rel) == (step, sigma_rel):
            return np.eye(len(snapshots))[k], 0.0
    steps = np.array([snapshot.step for snapshot in snapshots], np.float64)
    gammas = np.array([gamma_of(snapshot.sigma_rel) for snapshot in snapshots])
    wanted = np.float64(step), np.float64(gamma_of(sigma_rel))
    gram = products(steps[:, None], gammas[:, None], steps, gammas)  # (N, N)
    target = products(steps, gammas, *wanted)
    scale = 1 / np.sqrt(gram.diagonal())  # profiles of norm 1 are better conditioned
    right = np.stack([scale * target, scale], axis=1)
    free, correction = scale * np.linalg.lstsq(scale[:, None] * gram * scale, right, rcond=SMALLEST)[0].T
    weights = free + correction * (1 - free.sum()) / correction.sum()
    norm = products(*wanted, *wanted)
    squared = (norm - 2 * weights @ target + weights @ gram @ weights) / norm
    return weights, float(np.sqrt(max(0.0, squared)))


def combine(snapshots: Sequence[Snapshot], weights: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
    """For each set of weights the sum of the snapshots' tensors, float32; what is no floating-point number is taken as it is.

    Sums are float64, and one tensor of one snapshot is in memory beside them. Raises ValueError for a file that does not fit or
    is not finite.
    """
    sums: list[dict[str, Tensor]] = [{} for _ in weights]
    for k, snapshot in enumerate(snapshots):
        shares = [float(set_[k]) for set_ in weights]
        if not any(shares):
            continue
        with _opened(snapshot) as file:
            names = set(file.keys())
            if sums[0] and names != sums[0].keys():
                raise ValueError(f"{snapshot.path} holds other tensors than the snapshots before it: it is of another model")
            for name in names:
                _add(sums, name, file.get_tensor(name), shares, snapshot)
    return [{name: value.float() if value.dtype == torch.float64 else value for name, value in sum_.items()} for sum_ in sums]


def _add(sums: list[dict[str, Tensor]], name: str, value: Tensor, shares: Sequence[float], snapshot: Snapshot) -> None:
    if not value.isfinite().all():
        raise ValueError(f"{snapshot.path}: {name} is not finite, for the run had diverged: remove it")
    for total, share in zip(sums, shares, strict=True):
        if not value.is_floating_point():
            total[name] = value
        elif name not in total:
            total[name] = share * value.double()
        elif total[name].shape != value.shape:
            raise ValueError(f"{snapshot.path}: {name} is {tuple(value.shape)}, {tuple(total[name].shape)} in the others")
        else:
            total[name].add_(value, alpha=share)


@contextlib.contextmanager
def _opened(snapshot: Snapshot):
    try:
        with safe_open(snapshot.path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{snapshot.path} is damaged ({error}): remove it") from error


if __name__ == "__main__":
    cli.run(main)
