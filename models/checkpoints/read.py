"""A checkpoint's weights, and what its file says about them."""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from models.checkpoints.diffusers_dit import is_diffusers_state, read_diffusers
from models.checkpoints.files import read_file, weights_file, weights_of
from models.checkpoints.recognise import recognise
from models.registry import CONFIGS, FAMILIES, model_config, name_of

TRANSPORT_ARGS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")  # flags of the published SiT scripts
STATED = "its config entry"


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
    stated = stated if isinstance(stated, dict) else {}
    config = _stated_config(stated, file)
    if config is not None:
        name, how = stated["model"], STATED
    else:
        config, how = recognise(state, file, model=model, args=content.get("args"))
        name = name_of(config)
    return Checkpoint(
        path=file,
        state=state,
        model=name,
        config=config,
        codec=stated.get("codec", {}),
        class_names=tuple(stated.get("class_names", ())),
        objective=_objective(stated, content.get("args"), config),
        step=content.get("step"),
        recognised_by=how,
    )


def _stated_config(stated: dict, file: Path) -> object | None:
    """The config of a ``config`` entry that :func:`describe` made; None for another one."""
    name = stated.get("model")
    kinds = {family.network.__name__: kind for kind, family in FAMILIES.items()}
    if str(name) not in CONFIGS and (name is not None or stated.get("family") not in kinds):
        return None
    fields = stated.get("model_config")
    if not isinstance(fields, dict):
        raise ValueError(f"{file} names the model {name} but states no model_config: it was not written by this code")
    try:
        return model_config(name, **fields) if name is not None else kinds[stated["family"]](**fields)
    except TypeError as error:
        raise ValueError(f"{file} states a model_config that no model has ({error}): it was not written by this code") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _objective(stated: dict, args: object, config: object) -> dict:
    """What the file's config entry says; else, for published files, what its family is trained for and its args say."""
    objective = stated.get("objective")
    if objective is not None:
        return {"name": objective} if isinstance(objective, str) else objective
    objective = {"name": FAMILIES[type(config)].objective}
    if objective["name"] == "transport" and isinstance(args, argparse.Namespace):
        objective |= {key: value for key, value in vars(args).items() if key in TRANSPORT_ARGS}
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
