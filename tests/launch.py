"""Run the scripts as a user does, in processes of their own."""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from runtime import cli
from tests.forks import FORKS, SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_command(*command: str, expect: int = 0, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a command line with the environment's programs first on the PATH; its output is shown if the exit code is another."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expect, f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_script(script: str, *args: str, processes: int = 1, expect: int = 0) -> "subprocess.CompletedProcess | Ended":
    """``python script ...``, or with several processes: a script of ours by :func:`run_job`, another under torchrun."""
    if processes == 1:
        return run_command(sys.executable, script, *args, expect=expect)
    module = script.removesuffix(".py").replace("/", ".")
    if module in SCRIPTS:
        return run_job(module, args, processes, expect=expect)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}")
    return run_command(*launcher, f"--master_port={free_port()}", script, *args, expect=expect)


# --- jobs of several processes without a launcher, watched by nobody: a process that another's failure does not end hangs.


@dataclass(frozen=True)
class Ended:
    """A job's exit codes, -9 for a kill, and what its processes wrote, in their order."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def launcher_store() -> TCPStore:
    """The store that a launcher keeps for its processes, over all their restarts."""
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)


def run_job(
    script: str, argv: Sequence, processes: int, *, prepare: Callable[[int], None] | None = None, expect: int | None = 0,
    store: TCPStore | None = None, timeout: float = 240,
) -> Ended:  # fmt: skip
    """``main(argv)`` of a script's module in several processes.

    prepare: called first in each with its rank; a function of a module. expect: the exit code of all; None: any.
    """
    store = store or launcher_store()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            environment = dict(os.environ) | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            arguments = (script, list(map(str, argv)), environment, prepare, os.path.join(folder, str(rank)))
            started.append(FORKS.Process(target=_process_of_job, args=arguments))
            started[-1].start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(started) if process.exitcode is None]
        for rank in hanging:
            started[rank].kill()
            started[rank].join()
        out, err = ("".join(Path(folder, f"{rank}.{k}").read_text() for rank in range(processes)) for k in ("out", "err"))
    assert not hanging, f"{script}: processes {hanging} hang\n{out}\n{err}"
    ended = Ended([process.exitcode for process in started], out, err)
    assert expect is None or ended.codes == [expect] * processes, f"{script}: exit {ended.codes}\n{out}\n{err}"
    return ended


def _process_of_job(script: str, argv: list[str], environment: dict, prepare: Callable[[int], None] | None, path: str) -> None:
    os.environ.clear()  # what the server started with
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [script]
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{path}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    if prepare:
        prepare(int(environment["RANK"]))
    cli.run(lambda _: importlib.import_module(script).main(argv))
