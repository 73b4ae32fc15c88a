"""The file formats: ``.pt``, and ``.safetensors`` with or without what this code writes into the header."""

import argparse
import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

WEIGHT_KEYS = ("ema", "model")
PIPELINE_NETWORK = "transformer"  # the folder of the network in a diffusers pipeline
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


def weights_file(path: str | os.PathLike) -> Path:
    """The file that holds a checkpoint's weights: ``path``, or for a diffusers pipeline or its transformer folder the
    safetensors in it.

    Raises FileNotFoundError, or ValueError for another folder, or for one with other weight files.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        return path
    folder = path / PIPELINE_NETWORK if (path / PIPELINE_NETWORK).is_dir() else path
    file = folder / f"{DIFFUSERS_WEIGHTS}.safetensors"
    if file.is_file():
        return file
    others = sorted(other.name for other in folder.glob(f"{DIFFUSERS_WEIGHTS}*"))
    if others or folder != path:
        raise ValueError(
            f"checkpoint {folder} holds {others[0] if others else 'no weights'}, not {file.name}: of a diffusers model one "
            "whole safetensors file is read; save_pretrained(folder, max_shard_size='100GB') of diffusers writes it"
        )
    raise ValueError(
        f"checkpoint {path} is a folder: name a file in it, for a run checkpoints/latest, or a diffusers pipeline's folder, "
        f"which holds {PIPELINE_NETWORK}/"
    )


def read_file(path: str | os.PathLike) -> dict:
    """The whole content of a ``.pt`` or ``.safetensors`` file, on the CPU (a ``.pt`` in zip format is memory-mapped).

    A ``.safetensors`` that says in its header which weights it holds is given the layout of our ``.pt`` files. Raises
    FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, or holds pickled code.
    """
    path = weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can make a reader raise anything, from IndexError to struct.error
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a cut file has no bytes
            raise
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(f"{path} holds pickled objects other than tensors, which could run code: refused") from None
        raise ValueError(f"{path} is damaged or no checkpoint ({_first_line(error)})") from None
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


def write_safetensors(state: dict[str, Tensor], file: BinaryIO, *, which: str, config: dict, step: int | None) -> None:
    """What :func:`read_file` reads back. which: the name of these weights. config: of :func:`models.checkpoints.describe`."""
    header = {"format": "pt", "weights": which, "config": json.dumps(config)}
    if step is not None:
        header["step"] = str(step)
    # Tensors that share memory, or have gaps in it, are refused by the format. Not save_file: it makes a file of its own, which
    # the caller's flush to disk would not reach.
    own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    file.write(safetensors.torch.save(own, header))


def weights_of(content: dict, path: str | os.PathLike, which: str) -> dict[str, Tensor]:
    """The state dict in a file's content: an entry, or all of it. Raises ValueError where there is none."""
    if which not in WEIGHT_KEYS:
        raise ValueError(f"which must be one of {WEIGHT_KEYS}, got {which!r}")
    found = held(content)
    if found and which not in found:
        raise ValueError(f"{path} holds {', '.join(found)}, but no {which} weights")
    state = content[which] if found else content
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; its entries are {', '.join(list(map(str, content))[:8])}")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def held(content: dict) -> list[str]:
    """Which weights a file names; none for a bare state dict."""
    return [key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]


def _plain(text: str | None) -> object:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
