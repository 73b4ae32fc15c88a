"""Processes and devices, in one place.

Every script runs as one process, under ``torchrun`` or under ``accelerate launch``, on CUDA, MPS or the CPU.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object
from torch.distributed import PrefixStore, Store

from runtime import watch

T = TypeVar("T")
GATHER_BYTES = 64 * 2**20  # what gather_rows sends at once
JOIN_SECONDS = 1800  # torch's own patience for a process group
LOST_WORDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def start() -> PartialState:
    """Join the process group, if there is one, and choose this process's device.

    Without an accelerator this asks for the CPU explicitly: otherwise accelerate under torchrun silently makes every process
    an independent copy. Raises ValueError when the launcher announced more processes than were joined.
    """
    if not torch.distributed.is_initialized():
        _join_group()
    state = PartialState() if has_accelerator() else PartialState(cpu=True)
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != state.num_processes:
        raise ValueError(
            f"the launcher announced WORLD_SIZE={announced} but {state.num_processes} process(es) joined: check the launcher's "
            "--nproc_per_node / --num_processes and MASTER_ADDR"
        )
    return state


def _join_group() -> None:
    """Make the process group that accelerate then takes as it is, and watch the other processes through the same store.

    The launcher's store outlives its restarts of the processes: what they find there must be of their own attempt.
    """
    rank, world = int(os.environ.get("RANK", "-1")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank < 0 or world == 1 or (has_accelerator() and not torch.cuda.is_available()):
        watch.begin(None, 0, 1)
        return
    try:
        store, rank, world = next(torch.distributed.rendezvous("env://"))
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"the {world} processes did not meet at MASTER_ADDR:MASTER_PORT, {where}: {error}") from error
    attempt = agree_on_attempt(PrefixStore("attempts", store), rank, world)
    watch.begin(PrefixStore(f"{attempt}/watch", store.clone()), rank, world)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=PrefixStore(attempt, store), rank=rank, world_size=world
    )


def agree_on_attempt(store: Store, rank: int, world: int) -> str:
    """A name for this attempt of the job, the same in all its processes, and in none of an earlier attempt.

    Whatever earlier attempts left in the store, a process takes only an answer to the name that it made up itself. The count of
    restarts would not do: with several nodes the launcher counts them on the failing one alone.
    """
    mine = uuid4().hex
    if rank > 0:
        store.set(f"call/{rank}", mine)
        _wait_for(lambda: store.check([f"answer/{mine}"]))
        attempt = store.get(f"answer/{mine}").decode()
        store.set(f"{attempt}/{rank}", "")
        return attempt

    def answer(others: list[int]) -> list[int]:
        """Returns those that have not heard."""
        waiting = [other for other in others if not store.check([f"{mine}/{other}"])]
        for other in waiting:
            if store.check([f"call/{other}"]):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", mine)
        return waiting

    waiting = list(range(1, world))
    _wait_for(lambda: not answer(waiting))
    return mine


def _wait_for(condition: Callable[[], bool]) -> None:
    """In Python, so that signals are seen. Raises ValueError after JOIN_SECONDS."""
    deadline, pause = time.monotonic() + JOIN_SECONDS, 0.01
    while not condition():
        if time.monotonic() > deadline:
            raise ValueError(
                f"not all of the {os.environ.get('WORLD_SIZE')} processes that the launcher announced joined within "
                f"{JOIN_SECONDS} seconds: check the launcher on every node, and MASTER_ADDR"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.2)  # hundreds of processes may ask one store


def lost_a_process(error: BaseException) -> bool:
    """Whether ``error`` is a collective's that found the connection to another process closed or gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_WORDS)
    )


def leave_group() -> None:
    """End this process's part in the process group, if it has one; all processes do so at about the same time.

    Left to the interpreter's exit, gloo's threads now and then abort a process that has done all its work.
    """
    watch.end()
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


def working_dtype(precision: str) -> torch.dtype:
    """What ``--precision`` stands for."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


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
