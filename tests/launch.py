"""Run the scripts as a user does, in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def run_script(script: str, *args: str, processes: int = 1, expect: int = 0) -> subprocess.CompletedProcess:
    """``python script ...``, or under torchrun with several processes."""
    if processes == 1:
        return run_command(sys.executable, script, *args, expect=expect)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}")
    return run_command(*launcher, f"--master_port={free_port()}", script, *args, expect=expect)
