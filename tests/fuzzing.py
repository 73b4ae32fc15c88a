"""Fuzzing in this process: run a script's ``main`` as its command line does, on drawn arguments, and tell how it ended.

tests/fuzz_commands.py draws command lines, tests/fuzz_files.py damages files; ``make soak`` runs thousands of both. A case may
end in success, a usage error (exit code 2 with the usage) or a clear error (exit code 1 and one line "error: ..."); a process
of its own may still be at work when its time is over. A traceback, another exit code, a hang, a temporary file left behind or
a secret in the output is a failure.
"""

import contextlib
import gc
import io
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import diffusers
import huggingface_hub
import matplotlib.figure
import timm
import torch
import wandb
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from data import sources
from evaluations import evaluator
from models.registry import FAMILIES
from runtime import cli
from training.data import Batches

SLOW = (diffusers.AutoencoderKL, matplotlib.figure, timm, wandb)  # imported now: an alarm must not strike within
SUCCESS, USAGE, CLEAR, NOT_ENDED, FAILURE = "success", "usage error", "clear error", "not ended", "failure"
OUTCOMES = (SUCCESS, USAGE, CLEAR, NOT_ENDED, FAILURE)
HERE = "{here}"  # in an argument: the case's own folder
SECRETS = ("s3cret-pass", "t0ken-value")  # in URLs and --wandb-key; no output and no file may show them
HANG_SECONDS, WORK_SECONDS, AGAIN_SECONDS = 20, 3, 5
DRAWN_FOR_ONE = 4  # hypothesis varies an example before it draws another: of these only some are run
FORWARDS = 8  # of a network, after which a case has shown that it works
IMAGES = 50  # read in training, likewise
MEMORY_BYTES = 4 * 2**30  # that a case may take on top of what the process has
FILE_BYTES = 2**30
LEFT_OVERS = (".tmp", ".part")


class Worked(BaseException):
    """The arguments were accepted, and the work has begun: enough."""


class Hang(BaseException):
    """Nothing came of it in time."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    message: str  # of a failure: what happened; of an error: the line


@dataclass
class Tally:
    """How cases ended, by category, and what to look at."""

    counts: dict[str, Counter] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, category: str, outcome: Outcome, case: object) -> None:
        self.counts.setdefault(category, Counter())[outcome.kind] += 1
        if outcome.kind == FAILURE:
            self.failures.append(f"{category}: {case!r}\n    {outcome.message}")

    def update(self, other: "Tally") -> None:
        for category, counts in other.counts.items():
            self.counts.setdefault(category, Counter()).update(counts)
        self.failures += other.failures

    def table(self) -> str:
        """Markdown: a line a category, and the sum."""
        total = sum(self.counts.values(), Counter())
        lines = [f"| | cases | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
        for category, counts in [*self.counts.items(), ("all", total)]:
            cells = [category, counts.total(), *(counts[kind] for kind in OUTCOMES)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


def draw(strategy: SearchStrategy, num_cases: int, number: int) -> list:
    """So many different examples, the same for the same seed ``number``."""
    drawn = {}

    @seed(number)
    @settings(
        max_examples=DRAWN_FOR_ONE * num_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example):
        drawn.setdefault(repr(example), example)

    collect()
    found = list(drawn.values())
    return found[:: max(1, len(found) // num_cases)][:num_cases]


@contextlib.contextmanager
def case_folder(template: Path) -> Iterator[Path]:
    """A copy of ``template`` to work in, and to spoil; checkpoints are linked."""

    def copy(source: str, target: str) -> None:
        if source.endswith((".pt", ".npz")):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    folder = Path(tempfile.mkdtemp(prefix="case-", dir=template.parent))
    try:
        shutil.copytree(template, folder, symlinks=True, dirs_exist_ok=True, copy_function=copy)
        yield folder
    finally:
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def run_case(main: Callable, arguments: Sequence[str], folder: Path) -> Outcome:
    """``arguments`` may name the folder as ``{here}``."""
    argv = [argument.replace(HERE, str(folder)) for argument in arguments]
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True) for errors in ("strict", "backslashreplace")
    )
    with _as_a_process(folder, argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = _ended(main, argv)
    said = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    outcome = _judge(ended, said[1])
    if outcome.kind != FAILURE:
        leaked = _leaks(argv, "".join(said), folder)
        left = [path.name for path in folder.rglob("*") if path.name.endswith(LEFT_OVERS)]
        if leaked or left:
            return Outcome(FAILURE, leaked or f"left behind: {', '.join(left)} ({outcome.message})")
    return outcome


def _ended(main: Callable, argv: list[str]) -> BaseException | None:
    try:
        cli.run(lambda _: main(argv))
    except BaseException as error:  # whatever it is
        return error
    return None


def _judge(ended: BaseException | None, err: str) -> Outcome:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if isinstance(ended, Hang):
        return Outcome(FAILURE, f"hangs at {_place(ended)}")
    if ended is not None and not isinstance(ended, SystemExit | Worked):
        return Outcome(FAILURE, f"{type(ended).__name__}: {str(ended)[:200]} at {_place(ended)}")
    if isinstance(ended, Worked):
        return Outcome(SUCCESS, "worked")
    if "Traceback (most recent call last)" in err:
        return Outcome(FAILURE, f"a traceback: {err[-600:]}")
    code = ended.code if isinstance(ended, SystemExit) else 0
    if code in (0, None):
        return Outcome(SUCCESS, "worked")
    if code == 2 and "usage: " in err:
        return Outcome(USAGE, err.splitlines()[-1])
    if code == 1 and len(lines) == 1 and len(lines[0]) > len("error: '...'"):
        return Outcome(CLEAR, lines[0])
    return Outcome(FAILURE, f"exit code {code} and {len(lines)} error lines: {err[-300:]}")


def _place(error: BaseException) -> str:
    """The innermost of our lines, and the innermost of all."""
    frames, trace = [], error.__traceback__
    while trace:
        frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    root = str(Path(__file__).parent.parent)
    frames = [frame for frame in frames if not frame.startswith(__file__)]
    ours = [frame.removeprefix(f"{root}/") for frame in frames if frame.startswith(root) and "/.venv" not in frame]
    return f"{ours[-1] if ours else '?'} ({frames[-1] if frames else '?'})"


def _leaks(argv: list[str], said: str, folder: Path) -> str | None:
    for secret in SECRETS:
        if any(secret in argument for argument in argv):
            if secret in said:
                return f"the output shows {secret}: {said[-300:]}"
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
                    return f"{path.relative_to(folder)} holds {secret}"
                if secret in path.name:
                    return f"{path.relative_to(folder)} is named by {secret}"
    return None


# What a case sees and may change, and gets back.


@contextlib.contextmanager
def _as_a_process(folder: Path, argv: list[str]) -> Iterator[None]:
    """Working in ``folder``, without network, within limits of time, memory and file size; afterwards all is as before."""
    threads, signals = torch.get_num_threads(), {number: signal.getsignal(number) for number in _SIGNALS}
    limits = {limit: resource.getrlimit(limit) for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    working_folder, timeout = os.getcwd(), socket.getdefaulttimeout()
    environment = {"TORCH_HOME": str(folder / "cache"), "WANDB_MODE": "disabled"}
    gc.freeze()  # so that the collection afterwards looks at the case's own objects
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES, limits[resource.RLIMIT_AS][1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, limits[resource.RLIMIT_FSIZE][1]))
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "argv", ["script.py", *argv]),
            mock.patch.object(threading, "excepthook", threading.excepthook),
            mock.patch.object(socket, "getaddrinfo", _no_network),
            mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),  # it would try again for a minute
            mock.patch.object(torch.nn.Module, "compile", lambda *args, **kwargs: None),  # it takes minutes
            mock.patch.object(torch, "compile", lambda forward, **kwargs: forward),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            _work_is_cut_short(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_alarm(0)
        for limit, value in limits.items():
            resource.setrlimit(limit, value)
        for number, handler in signals.items():
            signal.signal(number, handler)
        os.chdir(working_folder)
        socket.setdefaulttimeout(timeout)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


@contextlib.contextmanager
def _work_is_cut_short() -> Iterator[None]:
    """The alarm says Hang before the work, and Worked within it; and a network is called only so many times."""
    working, calls, loads = [], 0, 0

    def alarm(*_) -> None:
        raise Worked if working else Hang

    def begin() -> None:
        if not working:
            working.append(True)
            _set_alarm(WORK_SECONDS)

    def network(forward: Callable) -> Callable:
        def counted(self, *args, **kwargs):
            nonlocal calls
            begin()
            calls += 1
            if calls > FORWARDS:
                raise Worked
            return forward(self, *args, **kwargs)

        return counted

    def compute(*args, **kwargs):
        begin()
        return scores(*args, **kwargs)

    def load(*args):
        nonlocal loads
        loads += 1
        if loads > IMAGES:
            begin()
        return load_image(*args)

    def draws(*args):
        begin()
        return make_batch(*args)

    scores, load_image, make_batch = evaluator.compute, sources.load_image, Batches.__call__
    signal.signal(signal.SIGALRM, alarm)
    with contextlib.ExitStack() as stack:
        for family in FAMILIES.values():
            stack.enter_context(mock.patch.object(family.network, "forward", network(family.network.forward)))
        stack.enter_context(mock.patch.object(evaluator, "compute", compute))
        stack.enter_context(mock.patch.object(Batches, "__call__", draws))
        stack.enter_context(mock.patch.object(sources, "load_image", load))
        _set_alarm(HANG_SECONDS)
        yield


def _set_alarm(seconds: float) -> None:
    """It rings again: the first time it may strike where exceptions are ignored."""
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)


def _no_network(*args, **kwargs):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
