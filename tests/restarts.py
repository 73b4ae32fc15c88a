"""Training under torchrun --max-restarts, killed at random moments of its first attempts: which process and when depend on the
seed and the attempt alone.

    torchrun --max-restarts=3 ... tests/restarts.py SEED KILLS TRAINING-FLAGS
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import train_mask_adan
from runtime import cli
from tests.launch import free_port, run_command
from training.step import TrainingStep

STEP_SECONDS = 0.1  # at least, so that a kill finds the run under way


def restart(argv: list[str], *, seed: int, kills: int, processes: int = 2) -> int:
    """Train with so many kills at most; how many there were. Every other seed has the launcher's other kind of rendezvous."""
    rendezvous = f"--master_port={free_port()}" if seed % 2 else "--standalone"
    launcher = [sys.executable, "-m", "torch.distributed.run", rendezvous, f"--nproc_per_node={processes}", "--max-restarts=3"]
    done = run_command(*launcher, Path(__file__), str(seed), str(kills), *argv, "--resume", "auto")
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.count("killed in attempt")


def main(argv: list[str]) -> None:
    seed, kills, *flags = argv
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    draw = random.Random(f"{seed}/{attempt}")
    victim, seconds = draw.randrange(int(os.environ["WORLD_SIZE"])), draw.uniform(0, 2)
    begun, losses = threading.Event(), TrainingStep._losses

    def slow(self, batch, t):
        begun.set()
        time.sleep(STEP_SECONDS)
        return losses(self, batch, t)

    def kill() -> None:
        begun.wait()
        time.sleep(seconds)
        print(f"killed in attempt {attempt}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    TrainingStep._losses = slow
    if attempt < int(kills) and rank == victim:
        threading.Thread(target=kill, daemon=True).start()
    train_mask_adan.main(flags)


if __name__ == "__main__":
    cli.run(lambda _: main(sys.argv[1:]))
