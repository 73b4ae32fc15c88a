"""A sharded checkpoint: a folder ``<step>/`` of safetensors, which all processes write, and ``facts.pt`` with all else.

Any number of processes read it: torch.distributed.checkpoint finds the pieces of a tensor by the offsets in the files' headers.
Nothing is pickled but ``facts.pt``, which is read as every ``.pt``: tensors and plain values only.
"""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from models.checkpoints import read_file
from models.checkpoints.files import SHARDED_FACTS
from runtime.cli import first_line
from runtime.distributed import SharedError, together
from runtime.files import file_sha256, save_atomic

FILES = "files"  # entry of the facts: name -> sha256 of every other file
FILE_BYTES = 2**28  # of a file, about
NAME_SEPARATOR = "/"


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint's, whole or not; one in a run has the step as its name."""
    if not path.is_dir():
        return False
    folder = path.resolve()
    return (folder.name.isdecimal() and folder.parent.name == "checkpoints") or (folder / SHARDED_FACTS).is_file()


def split(state: dict) -> tuple[dict, dict[str, DTensor]]:
    """-> (the state with None in place of each DTensor, the DTensors by their path in it, as "opt/state/3/exp_avg")."""
    tensors: dict[str, DTensor] = {}

    def strip(value: object, path: str) -> object:
        if isinstance(value, DTensor):
            tensors[path] = value
            return None
        if isinstance(value, dict):
            return {key: strip(entry, f"{path}{NAME_SEPARATOR}{key}" if path else str(key)) for key, entry in value.items()}
        return value

    return strip(state, ""), tensors


def join(facts: dict, tensors: dict[str, Tensor]) -> dict:
    """The opposite of :func:`split`."""

    def fill(value: object, path: str) -> object:
        if isinstance(value, dict):
            return {key: fill(entry, f"{path}{NAME_SEPARATOR}{key}" if path else str(key)) for key, entry in value.items()}
        return tensors.get(path, value) if value is None else value

    return fill({key: value for key, value in facts.items() if key != FILES}, "")


def write(state: dict, path: Path) -> None:
    """Write a state whose large tensors are DTensors as the folder ``path``. Called by all processes.

    The folder has another name until all of it is on the disk. Raises ValueError on all of them where one cannot write.
    """
    process = PartialState()
    temporary = path.with_name(f".{path.name}.tmp")
    with together():
        if process.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    facts, tensors = split(state)
    try:
        try:
            _write_tensors(tensors, temporary)
        except CheckpointException as error:
            raise SharedError(f"cannot write {path}: {_first_failure(error)}; earlier checkpoints are unchanged") from error
        with together():
            mine = {file.name: file_sha256(file) for file in _files_of(temporary, process.process_index)}
        digests = {name: digest for part in gather_object([mine]) for name, digest in part.items()}
        with together():
            if process.is_main_process:
                _finish({**facts, FILES: digests}, temporary, path)
    finally:
        if process.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(tensors: dict[str, DTensor], folder: Path) -> None:
    """Several files for each process: one is put together in memory before it is written."""
    sizes = np.array([tensor.nbytes / PartialState().num_processes for tensor in tensors.values()])
    numbers = 1 + (sizes.cumsum() // FILE_BYTES).astype(int)
    writer = HuggingFaceStorageWriter(
        os.fspath(folder), dict(zip(tensors, numbers.tolist(), strict=True)), save_distributed=True
    )
    dcp.save(tensors, storage_writer=writer)


def _files_of(folder: Path, process: int) -> list[Path]:
    return sorted(folder.glob(f"shard-{process + 1:05d}-*.safetensors"))


def _finish(facts: dict, temporary: Path, path: Path) -> None:
    missing = [name for name in facts[FILES] if not (temporary / name).is_file()]
    if missing:
        raise ValueError(
            f"{temporary / missing[0]}, written by another process, is not there: --results-dir must be on a disk that all "
            "nodes share"
        )
    save_atomic(facts, temporary / SHARDED_FACTS)
    sync_folder(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first process that failed."""
    _, (cause, _) = min(error.failures.items())
    return getattr(cause, "strerror", None) or first_line(cause)


def check_files(path: Path) -> None:
    """Raises ValueError for a folder whose files are not those that were written."""
    for name, digest in read_facts(path)[FILES].items():
        if not (path / name).is_file():
            raise ValueError(f"{path} is damaged ({name} is missing)")
        if file_sha256(path / name) != digest:
            raise ValueError(f"{path} is damaged (the checksum of {name} is wrong)")


def read_facts(path: Path) -> dict:
    """All of a checkpoint but the tensors in shards, which are None. Raises ValueError where it is no such checkpoint."""
    facts = read_file(path / SHARDED_FACTS)
    files = facts.get(FILES)
    if not isinstance(files, dict) or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise ValueError(f"{path / SHARDED_FACTS} does not name the files of its folder")
    return facts


def read_into(path: Path, facts: dict, model: dict[str, Tensor], averages: dict[str, Tensor], optimizer: Optimizer) -> dict:
    """The whole content of a checkpoint, with DTensors in shards like those of this run. Called by all processes.

    model, averages: state dicts that are read into. optimizer: whose parameters tell how its state is to be sharded.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {key: torch.zeros_like(parameters[i]) for key, value in entries.items() if value is None}
        for i, entries in facts["opt"]["state"].items()
    }
    _, tensors = split({"model": model, "ema": averages, "opt": {"state": state}})
    _read_tensors(tensors, path)
    return join(facts, tensors)


def read_whole(path: Path) -> dict:
    """The whole content of a checkpoint with whole tensors, in the layout of a ``.pt``; by one process, without a group.

    Raises ValueError for one that cannot be read; what :func:`check_files` finds is not looked for.
    """
    facts = read_facts(path)
    try:
        metadata = HuggingFaceStorageReader(os.fspath(path)).read_metadata().state_dict_metadata
        tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in metadata.items()}
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:  # headers that were never written
        raise ValueError(f"{path} is damaged ({error!r})") from error
    _read_tensors(tensors, path, no_dist=True)
    return join(facts, tensors)


def _read_tensors(tensors: dict[str, Tensor], path: Path, no_dist: bool = False) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(os.fspath(path)), no_dist=no_dist)
    except CheckpointException as error:
        raise SharedError(f"cannot read {path}: {_first_failure(error)}") from error
    except (SafetensorError, LookupError, TypeError, ValueError) as error:  # headers that were never written
        raise ValueError(f"{path} is damaged ({error!r})") from error
