"""Checkpoint files -> weights and the network that fits them. Nothing but tensors and plain values is ever unpickled."""

import argparse
import dataclasses
import errno
import json
import math
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from models.amm import AMM
from models.registry import CONFIGS, FAMILIES, build_network, model_config, name_of, resolve_amm, same_size, size

WEIGHT_KEYS = ("ema", "model")
TRANSPORT_ARGS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")  # flags of the published SiT scripts


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's weights and what the file says about them."""

    path: Path
    state: dict[str, Tensor]
    model: str | None  # the registered name, None where the sizes fit no registered model
    config: object  # the model's config dataclass
    codec: dict = field(default_factory=dict)  # name and scale of the latent codec; empty where the file does not say
    class_names: tuple[str, ...] = ()
    objective: dict = field(default_factory=lambda: {"name": "gaussian"})  # or "transport", with the transport's settings
    step: int | None = None


def read_file(path: str | os.PathLike) -> dict:
    """The whole content of a ``.pt`` or ``.safetensors`` file, on the CPU (a ``.pt`` in zip format is memory-mapped).

    Raises FileNotFoundError, or ValueError for a file that is damaged, is no checkpoint, or holds pickled code.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder: name a file in it, for a run checkpoints/latest")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
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


def load_checkpoint(path: str | os.PathLike, which: str = "ema") -> dict[str, Tensor]:
    """The state dict of a checkpoint.

    which: "ema" or "model", for files that hold both; a bare state dict is returned as it is. Raises as :func:`read_file`.
    """
    return _weights(read_file(path), path, which)


def read_checkpoint(path: str | os.PathLike, which: str = "ema") -> Checkpoint:
    """:func:`load_checkpoint`, with the model's config: as the file states it, else inferred from keys and shapes."""
    content = read_file(path)
    state = _weights(content, path, which)
    stated = content.get("config")
    stated = stated if isinstance(stated, dict) else {}
    if str(stated.get("model")) in CONFIGS:
        name = stated["model"]
        if not isinstance(stated.get("model_config"), dict):
            raise ValueError(f"{path} names the model {name} but states no model_config: it was not written by this code")
        config = model_config(name, **stated["model_config"])
    else:
        family = next((family for family in FAMILIES.values() if family.is_state(state)), None)
        if family is None:
            raise ValueError(f"{path} holds weights of no model known here; the models are {', '.join(CONFIGS)}")
        config = family.config_from_state(state)
        name = name_of(config)
    return Checkpoint(
        path=Path(path),
        state=state,
        model=name,
        config=config,
        codec=stated.get("codec", {}),
        class_names=tuple(stated.get("class_names", ())),
        objective=_objective(stated, content.get("args"), config),
        step=content.get("step"),
    )


def _objective(stated: dict, args: object, config: object) -> dict:
    """What the file's config entry says; else, for published files, what its family is trained for and its args say."""
    objective = stated.get("objective")
    if objective is not None:
        return {"name": objective} if isinstance(objective, str) else objective
    objective = {"name": FAMILIES[type(config)].objective}
    if objective["name"] == "transport" and isinstance(args, argparse.Namespace):
        objective |= {key: value for key, value in vars(args).items() if key in TRANSPORT_ARGS}
    return objective


def describe(name: str, config: object, *, codec: dict, class_names: tuple[str, ...], objective: dict | None = None) -> dict:
    """The ``config`` entry of our checkpoints: plain values that :func:`read_checkpoint` turns back into a model.

    objective: {"name": "gaussian"} (also for None), or {"name": "transport", ...} with the transport's settings.
    """
    return {
        "model": name,
        "model_config": json.loads(json.dumps(dataclasses.asdict(config))),
        "codec": codec,
        "class_names": list(class_names),
        "objective": objective or {"name": "gaussian"},
    }


def build_model(
    checkpoint: Checkpoint, *, name: str | None = None, amm: AMM | str | bool | None = False, cfg_scale: float = 1.0
) -> nn.Module:
    """The network of a checkpoint, in eval mode, with its weights.

    name: what the user believes it is; ValueError where the file holds another model. amm: as in :func:`models.create_model`;
    True takes the placement published for this model and guidance scale.
    """
    if name is not None:
        asked = model_config(name)
        if name != checkpoint.model and not same_size(asked, checkpoint.config):
            sizes = " and ".join(f"{field} {value}" for field, value in size(checkpoint.config).items())
            held = checkpoint.model or f"a model of {sizes}"
            raise ValueError(f"{checkpoint.path} holds {held}, not {name}: leave the model's name out, or pass the right file")
    amm = resolve_amm(name or checkpoint.model or "this model", amm, cfg_scale, checkpoint.config.input_size)
    model = build_network(checkpoint.config, amm)
    load_weights(model, checkpoint.state, checkpoint.path)
    return model.eval()


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """``load_state_dict``, strictly, with a ValueError that names the file and the first differences, or the resolutions."""
    _check_resolution(model, state, path)
    problems = differences(model.state_dict(), state)
    if problems:
        raise ValueError(f"{path} does not fit the model: {summary(problems)}")
    model.load_state_dict(state)


def differences(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """How the keys and shapes of a state dict differ from those of a model's, a line each."""
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not a weight of this model" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model's is {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    return problems


def summary(problems: list[str]) -> str:
    more = f", and {len(problems) - 3} more differences" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def warm_start(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Load a checkpoint into a model for another dataset: all but the label table, which is loaded only if the number of
    classes is the same. Returns whether it was. Raises ValueError where anything else differs."""
    key = "y_embedder.embedding_table.weight"
    state = dict(checkpoint.state)
    fresh = model.state_dict()[key]
    same_classes = key in state and state[key].shape == fresh.shape
    if not same_classes:
        state[key] = fresh
    load_weights(model, state, checkpoint.path)
    return same_classes


def _check_resolution(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    config, table = model.config, state.get("pos_embed")
    patches = state.get("x_embedder.proj.weight")
    if table is None or table.ndim != 3 or table.shape[1] == model.pos_embed.shape[1]:
        return
    if patches is not None and patches.shape[-1] != config.patch_size:
        return  # another model, which the shapes will tell
    held, wanted = math.isqrt(table.shape[1]) * config.patch_size, config.input_size
    raise ValueError(
        f"{path} holds the position tables of latents {held} wide (with a VAE of 8: {8 * held}-pixel images), the model's are "
        f"{wanted} wide ({8 * wanted} pixels): {FAMILIES[type(config)].other_resolution}"
    )


def _weights(content: dict, path: str | os.PathLike, which: str) -> dict[str, Tensor]:
    if which not in WEIGHT_KEYS:
        raise ValueError(f"which must be one of {WEIGHT_KEYS}, got {which!r}")
    found = [key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]
    if found and which not in found:
        raise ValueError(f"{path} holds {', '.join(found)}, but no {which} weights")
    state = content[which] if found else content
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; its entries are {', '.join(list(map(str, content))[:8])}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
