"""Processes and devices, in one place.

Every script runs as one process, under ``torchrun`` or under ``accelerate launch``, on CUDA, MPS or the CPU.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
GATHER_BYTES = 64 * 2**20  # what gather_rows sends at once


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def start() -> PartialState:
    """Join the process group, if there is one, and choose this process's device.

    Without an accelerator this asks for the CPU explicitly: otherwise accelerate under torchrun silently makes every process
    an independent copy. Raises ValueError when the launcher announced more processes than were joined.
    """
    state = PartialState() if has_accelerator() else PartialState(cpu=True)
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != state.num_processes:
        raise ValueError(
            f"the launcher announced WORLD_SIZE={announced} but {state.num_processes} process(es) joined: check the launcher's "
            "--nproc_per_node / --num_processes and MASTER_ADDR"
        )
    return state


def leave_group() -> None:
    """End this process's part in the process group, if it has one; all processes do so at about the same time.

    Left to the interpreter's exit, gloo's threads now and then abort a process that has done all its work.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_training(precision: str) -> Accelerator:
    """:func:`start`, with what training needs on top: mixed precision and DDP.

    precision: see :func:`check_precision`.
    """
    check_precision(precision, start().device)
    return Accelerator(
        cpu=not has_accelerator(),
        mixed_precision="no" if precision == "fp32" else precision,
        # Buckets alias the gradients, so that these are held once; the networks' buffers are constants, alike everywhere.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


def my_share(items: Sequence[T], state: PartialState | Accelerator) -> Sequence[T]:
    """This process's contiguous slice of ``items``; the slices of all processes make up the whole, sizes differ by one at
    most."""
    rank, world = state.process_index, state.num_processes
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def note(text: str) -> None:
    """A remark for the user, on stderr, said by the first process only."""
    if is_first_process():
        print(f"note: {text}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Known from the launcher, also before and after there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for fp16 on a CPU: accelerate would silently train in fp32."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use --precision bf16 or fp32")


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast dtype of ``--precision``; None for fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class SharedError(ValueError):
    """What went wrong on one process, raised on all of them: one of them tells."""


@contextmanager
def together() -> Iterator[None]:
    """Work that every process does and whose errors it raises on all: otherwise the others would wait for one that has left.

    Within it, no process may need another. For what a user can cause; on anything else the launcher ends all processes.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if PartialState().num_processes == 1:
        if error:
            raise error
        return
    messages = [message for message in gather_object([error and str(error)]) if message]
    if messages:
        raise SharedError(messages[0]) from error


def gather_rows(rows: np.ndarray | None, state: PartialState) -> np.ndarray | None:
    """The rows (n_k, ...) of all processes, in the order of the processes, on the main process; None elsewhere.

    rows: contiguous, of one dtype and row shape everywhere; None where a process has none. Only the main process ever holds
    the rows of others, and the device only a block of them.
    """
    if state.num_processes == 1:
        return rows
    shapes = gather_object([None if rows is None else (rows.shape, rows.dtype.str)])
    known = [entry for entry in shapes if entry is not None]
    if not known:
        return None
    row_shape, dtype = known[0][0][1:], np.dtype(known[0][1])
    counts = [entry[0][0] if entry else 0 for entry in shapes]
    block = max(1, GATHER_BYTES // max(1, int(np.prod(row_shape)) * dtype.itemsize))
    if not state.is_main_process:
        for start in range(0, counts[state.process_index], block):
            torch.distributed.send(torch.from_numpy(rows[start : start + block]).to(state.device), 0)
        return None
    gathered = np.empty((sum(counts), *row_shape), dtype)
    gathered[: counts[0]] = rows if rows is not None else 0
    first = counts[0]
    for process, count in enumerate(counts[1:], start=1):
        for start in range(0, count, block):
            part = torch.from_numpy(gathered[first + start : first + min(start + block, count)])
            received = torch.empty_like(part, device=state.device)
            torch.distributed.recv(received, process)
            part.copy_(received)
        first += count
    return gathered
