"""Small training runs, what they leave, and what is the same in two of them."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from training.checkpoint import checkpoint_files
from training.data import Batch
from training.step import TrainingStep


def train_argv(features: Path, results: Path, *extra: str) -> list[str]:
    """Six steps, a log line and a checkpoint after every second one."""
    return [
        "--model", "EDT-Ti/2", "--feature-path", str(features), "--results-dir", str(results), "--global-batch-size", "4",
        "--epochs", "100", "--max-steps", "6", "--log-every", "2", "--ckpt-every", "2", *extra,
    ]  # fmt: skip


def run_folder(results: Path) -> Path:
    (folder,) = [path for path in results.iterdir() if path.is_dir()]
    return folder


def final_state(results: Path) -> dict:
    return torch.load(checkpoint_files(run_folder(results))[0], weights_only=True)


def metrics(results: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder(results) / "metrics.jsonl").read_text().splitlines()]


def keep_the_finished_run(results: Path) -> None:
    """Killed before its first checkpoint, a run leaves a folder without one, and the next has a new folder."""
    for folder in results.iterdir():
        if not list(folder.glob("checkpoints/*.pt")):
            shutil.rmtree(folder)


def in_step(monkeypatch, number: int, act) -> None:
    """act(batch) at the beginning of a step."""
    call = TrainingStep.__call__

    def watched(self, step, batch, lr, **kwargs):
        if step == number:
            act(batch)
        return call(self, step, batch, lr, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", watched)


def in_own_step(number: int, ranks: Sequence[int], act: Callable[[Batch], None], rank: int) -> None:
    """``prepare`` of a job: these processes act within that step since their start, which the others cannot do without them."""
    losses, steps = TrainingStep._losses, []

    def acting(self, batch, t):
        steps.append(t)
        if rank in ranks and len(steps) == number:
            act(batch)
        return losses(self, batch, t)

    TrainingStep._losses = acting


def be_killed(_: Batch) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same_state(a: dict, b: dict) -> None:
    """Bitwise, but for paths in the flags."""
    for key in ("step", "skipped", "skipped_in_a_row", "summed_steps", "sampler", "config", "data"):
        assert a[key] == b[key], key
    assert torch.equal(a["sums"], b["sums"])
    for which in ("model", "ema"):
        assert a[which].keys() == b[which].keys()
        for key, value in a[which].items():
            assert torch.equal(value, b[which][key]), (which, key)
    assert a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for index, state in a["opt"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["opt"]["state"][index][key]), (index, key)
    assert a["opt"]["param_groups"] == b["opt"]["param_groups"]


def assert_same_run(a: Path, b: Path) -> None:
    """The last checkpoint and the log, bitwise."""
    assert_same_state(final_state(a), final_state(b))
    assert (run_folder(a) / "metrics.jsonl").read_bytes() == (run_folder(b) / "metrics.jsonl").read_bytes()
