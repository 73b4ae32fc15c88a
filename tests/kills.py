"""Scripts that are killed at any moment of their work.

A moment is every step of a step, and before, within and after every write: ``kill -9`` at the k-th of them hits what a kill at
a random time would hit once in thousands.
"""

import functools
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from runtime import cli
from tests.forks import FORKS
from training.ema import EMA
from training.step import TrainingStep


def run(
    script: str,
    argv: list[str],
    *,
    kill_at: int | None = None,
    kill_after: float = 300,
    prepare: Callable[[], None] | None = None,
) -> tuple[int, int]:
    """A script's ``main`` in a process of its own: (exit code, -9 for a kill; how many moments there were).

    kill_at: the number of the moment to be killed in, from 1. kill_after: seconds after which it is killed wherever it is.
    prepare: a function of a module, called in the process first.
    """
    moments = FORKS.Value("i", 0)
    process = FORKS.Process(target=_child, args=(script, list(map(str, argv)), kill_at, moments, prepare))
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, moments.value


def run_with_kills(
    script: str, argv: Callable[[int], list[str]], num_kills: int, seed: int, longest: int, seconds: float = 0
) -> int:
    """Start a script again and again until it has been killed so often, then run it to its end. Where it comes to its end
    before, other work is begun: argv(0), argv(1), ... are the works' command lines. Returns how many were done.

    Each is killed in one of its first ``longest`` moments; with ``seconds``, every second one instead within so many seconds.
    """
    draw, kills, works, k = np.random.default_rng(seed), 0, 0, 0
    while kills < num_kills:
        if seconds and k % 2:
            code, _ = run(script, argv(works), kill_after=draw.uniform(0, seconds))
        else:
            code, _ = run(script, argv(works), kill_at=int(draw.integers(1, longest + 1)))
        assert code in (0, -signal.SIGKILL), f"{script} ended with exit code {code} after {kills} kills"
        kills, works, k = kills + (code != 0), works + (code == 0), k + 1
        assert works <= num_kills, "hardly a kill falls into the work: enlarge it"
    code, _ = run(script, argv(works))
    assert code == 0, f"{script} ended with exit code {code} after {kills} kills"
    return works + 1


def _child(script: str, argv: list[str], kill_at: int | None, moments, prepare: Callable[[], None] | None) -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    torch.set_num_threads(1)
    sys.argv = [script]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if not os.environ.get("SHOW_KILLED"):
        os.dup2(null, 2)
    if prepare:
        prepare()
    _watch_moments(kill_at, moments)
    cli.run(lambda _: importlib.import_module(script).main(argv))


def _watch_moments(kill_at: int | None, moments) -> None:
    def moment() -> None:
        moments.value += 1
        if moments.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, names in (
        (os, ("replace", "rename", "unlink", "symlink", "fsync", "mkdir")),
        (TrainingStep, ("_losses", "_update")),
        (EMA, ("update",)),
    ):
        for name in names:
            setattr(owner, name, _around(getattr(owner, name), moment))
    os.write, os.pwrite = _in_halves(os.write, moment), _in_halves(os.pwrite, moment)
    torch.save = functools.partial(_save_in_halves, torch.save, moment)


def _around(call: Callable, moment: Callable[[], None]) -> Callable:
    @functools.wraps(call)
    def watched(*args, **kwargs):
        moment()
        result = call(*args, **kwargs)
        moment()
        return result

    return watched


def _in_halves(write: Callable, moment: Callable[[], None]) -> Callable:
    """os.write or os.pwrite; a write of a part is what the callers must expect of the system, too."""

    def watched(descriptor: int, data, *offset: int) -> int:
        data = memoryview(data).cast("B")
        half = len(data) // 2
        moment()
        written = write(descriptor, data[:half], *offset) if half else 0
        moment()
        return written + write(descriptor, data[half:], *(start + half for start in offset))

    return watched


def _save_in_halves(save: Callable, moment: Callable[[], None], state: object, file) -> None:
    buffer = io.BytesIO()
    save(state, buffer)
    data = buffer.getvalue()
    moment()
    file.write(data[: len(data) // 2])
    file.flush()
    moment()
    file.write(data[len(data) // 2 :])
