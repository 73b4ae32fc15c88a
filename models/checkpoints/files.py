"""The file formats: ``.pt``, and ``.safetensors`` with or without what this code writes into the header."""

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHT_KEYS = ("ema", "model")
PIPELINE_NETWORK = "transformer"  # the folder of the network in a diffusers pipeline
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first one that is there
SHARDED_FACTS = "facts.pt"  # what makes a folder a sharded checkpoint of training
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # what DistributedDataParallel and torch.compile put before every key
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)  # weights; index buffers


def weights_file(path: str | os.PathLike) -> Path:
    """The file that holds a checkpoint's weights: ``path``, or for a diffusers pipeline or its transformer folder the
    safetensors in it, else the ``.bin``.

    Raises FileNotFoundError, or ValueError for another folder, or for one with other weight files.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        return path
    folder = path / PIPELINE_NETWORK if (path / PIPELINE_NETWORK).is_dir() else path
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(other.name for other in folder.glob("diffusion_pytorch_model*"))
    if others or folder != path:
        raise ValueError(
            f"checkpoint {folder} holds {others[0] if others else 'no weights'}, not {DIFFUSERS_WEIGHTS[0]}: of a "
            "diffusers model one whole file is read; save_pretrained(folder, max_shard_size='100GB') of diffusers writes it"
        )
    if (path / SHARDED_FACTS).is_file():
        raise ValueError(f"checkpoint {path} is in shards: {how_to_consolidate(path)}")
    raise ValueError(
        f"checkpoint {path} is a folder: name a file in it, for a run checkpoints/latest, or a diffusers pipeline's folder, "
        f"which holds {PIPELINE_NETWORK}/"
    )


def how_to_consolidate(path: Path, out: str = "OUT.pt") -> str:
    return f"make one file of them with python -m training.consolidate {path} {out}"


def is_safetensors(path: Path) -> bool:
    """By name, or by content: the length of a header, then the header, which is JSON."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def read_file(path: str | os.PathLike) -> dict:
    """The whole content of a ``.pt`` or ``.safetensors`` file, on the CPU (a ``.pt`` in zip format is memory-mapped).

    A ``.safetensors`` that says in its header which weights it holds is given the layout of our ``.pt`` files. Raises
    FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, or holds pickled code.
    """
    path = weights_file(path)
    try:
        if is_safetensors(path):
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can make a reader raise anything, from IndexError to struct.error
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a cut file has no bytes
            raise
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(f"{path} holds pickled objects other than tensors, which could run code: refused") from None
        raise ValueError(f"{path} is damaged or no checkpoint ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _read_safetensors(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    state = safetensors.torch.load_file(path)
    which, config = header.get("weights"), _plain(header.get("config"))
    if which not in WEIGHT_KEYS or not isinstance(config, dict):
        return state
    step = header.get("step", "")
    return {which: state, "config": config} | ({"step": int(step)} if step.isdecimal() else {})


def write_safetensors(state: dict[str, Tensor], path: str, *, which: str, config: dict, step: int | None) -> None:
    """What :func:`read_file` reads back, flushed to disk. which: the name of these weights. config: of
    :func:`models.checkpoints.describe`. Raises OSError."""
    about = {"format": "pt", "weights": which, "config": json.dumps(config)}
    if step is not None:
        about["step"] = str(step)
    try:
        safetensors.torch.save_file(_apart(state), path, about)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with open(path, "rb") as file:  # the library made a new file
        os.fsync(file.fileno())


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format takes no tensors that share memory or have gaps in it: copies of those."""
    own, taken = {}, set()
    for key, value in state.items():
        memory = value.untyped_storage()
        alone = value.is_contiguous() and memory.nbytes() == value.nbytes and memory.data_ptr() not in taken
        own[key] = value if alone else value.clone(memory_format=torch.contiguous_format)
        taken.add(memory.data_ptr())
    return own


def weights_of(content: dict, path: str | os.PathLike, which: str) -> dict[str, Tensor]:
    """The state dict in a file's content: an entry, or all of it. Raises ValueError where there is none."""
    if which not in WEIGHT_KEYS:
        raise ValueError(f"which must be one of {WEIGHT_KEYS}, got {which!r}")
    found = held(content)
    if found and which not in found:
        raise ValueError(
            f"{path} holds {', '.join(found)}, but no {which} weights: take the others with --weights {found[0]} "
            f"(in Python which={found[0]!r})"
        )
    state = content[which] if found else content
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; its entries are {', '.join(list(map(str, content))[:8])}")
    for key, value in state.items():
        _check_tensor(key, value, path)
    return {WRAPPERS.sub("", str(key)): value for key, value in state.items()}


def _check_tensor(key: str, value: Tensor, path: str | os.PathLike) -> None:
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu":
        kind = f"{'sparse' if value.layout != torch.strided else value.device.type} {kind}"
    elif value.dtype in DTYPES:
        return
    raise ValueError(f"{path}: {key} is {kind}; weights are dense and float16, bfloat16, float32 or float64: convert the file")


def held(content: dict) -> list[str]:
    """Which weights a file names; none for a bare state dict."""
    return [key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]


@contextlib.contextmanager
def naming(path: str | os.PathLike, keys_of: str, other: str) -> Iterator[None]:
    """Whatever keys, shapes and settings of another network make a reader raise, as a ValueError with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} has the keys of {keys_of}, but {other} ({error!r})") from error


def _plain(text: str | None) -> object:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    """A library's first line. torch's unpickler puts its reason behind a paragraph of advice to load the file unsafely."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
