"""Processes and devices, in one place.

Every script runs as one process, under ``torchrun`` or under ``accelerate launch``, on CUDA, MPS or the CPU.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState

T = TypeVar("T")


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


def start_training(precision: str, log_with: Sequence[str] = (), project_dir: str | None = None) -> Accelerator:
    """:func:`start`, with what training needs on top: mixed precision, DDP and trackers.

    precision: see :func:`check_precision`.
    """
    check_precision(precision, start().device)
    return Accelerator(
        cpu=not has_accelerator(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(log_with) or None,
        project_dir=project_dir,
        # Buckets alias the gradients, so that these are held once; the networks' buffers are constants, alike everywhere.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )


def my_share(items: Sequence[T], state: PartialState | Accelerator) -> Sequence[T]:
    """This process's contiguous slice of ``items``; the slices of all processes make up the whole, sizes differ by one at
    most."""
    rank, world = state.process_index, state.num_processes
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for fp16 on a CPU: accelerate would silently train in fp32."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use --precision bf16 or fp32")


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast dtype of ``--precision``; None for fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
