"""``--resume``: which checkpoint a run goes on from, and whether the flags are those that it was begun with."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from models.checkpoints.files import how_to_consolidate
from runtime.distributed import note, together
from training.checkpoint import read_content, whole_checkpoint
from training.shards import is_sharded

# What the shape of a run's state depends on beside the network: these cannot change.
STATE_FLAGS = ("masked", "optimizer", "objective", "timestep_sampler", "ema_profiles")
# What its result depends on besides: these change with --allow-changed. The number of processes, --micro-batch-size and
# --compile, --fsdp and --gradient-checkpointing only move the order of sums.
RESULT_FLAGS = (
    "seed", "global_batch_size", "init_lr", "final_lr", "lr_decay_steps", "weight_decay", "ema_decay", "label_dropout",
    "precision", "grad_clip", "min_snr_gamma", "path_type", "prediction", "loss_weight", "train_eps",
)  # fmt: skip


def read_state(args: Namespace, facts: dict, folder: Path, state: PartialState) -> tuple[Path, dict]:
    """The newest whole checkpoint of the run in ``folder``, or the one that ``--resume`` names, and its content.

    facts: what this run's own checkpoints will say. Raises ValueError for a run begun otherwise.
    """
    chosen = [None]
    with together():
        if state.is_main_process:
            path, remarks = whole_checkpoint(args.resume, folder)
            chosen = [path]
            for remark in remarks:
                note(remark)
    path = broadcast_object_list(chosen)[0]
    with together():
        if is_sharded(path) and not args.fsdp:
            raise ValueError(f"--resume {path} is in shards: add --fsdp, or {how_to_consolidate(path, f'{path}.pt')}")
        content = read_content(path)
        _compare(args, facts, content, path)
    return path, content


def _compare(args: Namespace, facts: dict, held: dict, path: Path) -> None:
    """Raises ValueError naming what differs from the flags and the data the run was begun with."""
    here, there = facts["config"], held["config"]
    if there["model"] != here["model"]:
        raise ValueError(f"--resume {path} is a run of {there['model']}, not of --model {here['model']}")
    fixed = _differences(there["model_config"], here["model_config"], there["model_config"])
    fixed += _differences(there["codec"], here["codec"], ["scale"])
    fixed += [f"--{line}" for line in _differences(held["args"], vars(args), STATE_FLAGS)]
    if fixed:
        raise ValueError(
            f"--resume {path}: the run was begun otherwise ({', '.join(fixed)}), and its state fits nothing else: give the "
            "same, or start a new run with --init-from"
        )
    changed = [f"--{line}" for line in _differences(held["args"], vars(args), RESULT_FLAGS)]
    changed += _differences(held["data"], facts["data"], held["data"])
    if changed and not args.allow_changed:
        raise ValueError(
            f"--resume {path}: the run was begun with other flags ({', '.join(changed)}): give the same, or accept the change "
            "with --allow-changed"
        )
    if changed:
        note(f"going on with other flags than the run was begun with: {', '.join(changed)}")


def _differences(old: dict, new: dict, names: Iterable[str]) -> list[str]:
    return [f"{name.replace('_', '-')} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
