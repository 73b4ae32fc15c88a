"""A checkpoint's weights, and what its file says about them."""

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from models.checkpoints.diffusers_dit import is_diffusers_state, read_diffusers
from models.checkpoints.files import read_file, weights_file, weights_of
from models.checkpoints.recognise import flags_of, recognise
from models.registry import CONFIGS, FAMILIES, model_config, name_of

TRANSPORT_ARGS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")  # flags of the published SiT scripts
STATED = "its config entry"
OBJECTIVES = ("gaussian", "transport")
CODEC_KINDS = {"name": str | None, "scale": float | None, "image_size": int | None}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's weights and what the file says about them."""

    path: Path  # the file that holds the weights
    state: dict[str, Tensor]
    model: str | None  # the registered name, None where the sizes fit no registered model
    config: object  # the model's config dataclass
    codec: dict = field(default_factory=dict)  # name and scale of the latent codec; empty where the file does not say
    class_names: tuple[str, ...] = ()
    objective: dict = field(default_factory=lambda: {"name": "gaussian"})  # or "transport", with the transport's settings
    step: int | None = None
    recognised_by: str = STATED  # what told the family


def load_checkpoint(path: str | os.PathLike, which: str = "ema") -> dict[str, Tensor]:
    """The state dict of a checkpoint; a diffusers DiT's with our keys.

    which: "ema" or "model", for files that hold both; a bare state dict is returned as it is. Raises as :func:`read_file`.
    """
    file = weights_file(path)
    state = weights_of(read_file(file), file, which)
    return read_diffusers(state, file).state if is_diffusers_state(state) else state


def read_checkpoint(path: str | os.PathLike, which: str = "ema", model: str | None = None) -> Checkpoint:
    """:func:`load_checkpoint`, with the model's config: as the file states it, else inferred from keys and shapes.

    path: a file, or a folder of diffusers. model: the name of what it is believed to hold, for files that do not tell, see
    :func:`models.checkpoints.recognise.recognise`; a wrong name is found by :func:`models.checkpoints.build_model`.
    """
    file = weights_file(path)
    return from_content(read_file(file), file, which, model)


def from_content(content: dict, file: Path, which: str, model: str | None = None) -> Checkpoint:
    """content: what :func:`read_file` gave for ``file``."""
    state = weights_of(content, file, which)
    if is_diffusers_state(state):
        found = read_diffusers(state, file)
        return Checkpoint(
            path=file,
            state=found.state,
            model=name_of(found.config),
            config=found.config,
            codec=found.codec,
            class_names=found.class_names,
            recognised_by="diffusers' keys",
        )
    stated = content.get("config")
    config = _stated_config(stated, state, file) if isinstance(stated, dict) else None
    if config is not None:
        _check_stated(stated, file)
        name, how = stated.get("model"), STATED
    else:
        stated = {}  # another program's entry: what it calls codec or objective need not be what we do
        config, how = recognise(state, file, model=model, args=content.get("args"))
        name = name_of(config)
    return Checkpoint(
        path=file,
        state=state,
        model=name,
        config=config,
        codec=stated.get("codec") or {},
        class_names=tuple(stated.get("class_names") or ()),
        objective=_objective(stated, content.get("args"), config),
        step=content["step"] if isinstance(content.get("step"), int) else None,
        recognised_by=how,
    )


def _stated_config(stated: dict, state: dict[str, Tensor], file: Path) -> object | None:
    """The config of a ``config`` entry that :func:`describe` made; None for another one."""
    name = stated.get("model")
    kinds = {family.network.__name__: kind for kind, family in FAMILIES.items()}
    if str(name) not in CONFIGS and (name is not None or str(stated.get("family")) not in kinds):
        return None
    fields = stated.get("model_config")
    if not isinstance(fields, dict):
        raise _not_ours(file, f"the model {name}, but no model_config")
    try:
        config = model_config(name, **fields) if name is not None else kinds[stated["family"]](**fields)
    except (TypeError, ArithmeticError) as error:
        raise _not_ours(file, f"a model_config that no model has ({error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for field_name, kind in typing.get_type_hints(type(config)).items():
        if not _is_a(getattr(config, field_name), kind):
            raise _not_ours(file, f"a model_config with {field_name} {getattr(config, field_name)!r}")
    blocks = sum(config.depths) if hasattr(config, "depths") else config.depth
    if blocks > len(state):  # building so many could take for ever
        raise ValueError(f"{file} states {blocks} blocks in its config entry, but holds only {len(state)} tensors")
    return config


def _check_stated(stated: dict, file: Path) -> None:
    """Raises ValueError for what the readers of a :class:`Checkpoint` could not use."""
    codec, names, objective = (stated.get(key) for key in ("codec", "class_names", "objective"))
    if codec is not None and not (_is_a(codec, dict) and all(_is_a(codec.get(key), kind) for key, kind in CODEC_KINDS.items())):
        raise _not_ours(file, f"the codec {codec!r}")
    if names is not None and not (_is_a(names, list | tuple) and all(_is_a(name, str) for name in names)):
        raise _not_ours(file, "class_names that are no list of strings")
    kind = objective.get("name") if isinstance(objective, dict) else objective
    if objective is not None and kind not in OBJECTIVES:
        raise _not_ours(file, f"the objective {objective!r}; they are {' and '.join(OBJECTIVES)}")


def _is_a(value: object, kind: object) -> bool:
    """Whether a plain value is what an annotation says; a bool is no number, and a number is finite."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(one, typing.get_args(kind)[0]) for one in value)
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _not_ours(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} states {what} in its config entry: it was not written by this code, or was changed since")


def _objective(stated: dict, args: object, config: object) -> dict:
    """What the file's config entry says; else, for published files, what its family is trained for and its args say."""
    objective = stated.get("objective")
    if objective is not None:
        return {"name": objective} if isinstance(objective, str) else objective
    objective = {"name": FAMILIES[type(config)].objective}
    if objective["name"] == "transport":
        objective |= {key: value for key, value in flags_of(args).items() if key in TRANSPORT_ARGS}
    return objective


def describe(
    name: str | None, config: object, *, codec: dict, class_names: tuple[str, ...], objective: dict | None = None
) -> dict:
    """The ``config`` entry of our checkpoints: plain values that :func:`read_checkpoint` turns back into a model.

    name: None for a size that has none. objective: {"name": "gaussian"} (also for None), or {"name": "transport", ...} with
    the transport's settings.
    """
    return {
        "model": name,
        **({} if name else {"family": FAMILIES[type(config)].network.__name__}),
        "model_config": json.loads(json.dumps(dataclasses.asdict(config))),
        "codec": codec,
        "class_names": list(class_names),
        "objective": objective or {"name": "gaussian"},
    }
