"""Which network a state dict is of."""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from models.registry import CONFIGS, FAMILIES, Family

KEYS_AND_SHAPES = "keys and shapes"
UNUSED_CHANNELS = "its unused channels"
NAMING_PARTS = 3  # of a path: <index>-<model>/checkpoints/<step>.pt


def recognise(state: dict[str, Tensor], path: Path, *, model: str | None = None, args: object = None) -> tuple[object, str]:
    """(config, how it was recognised).

    A DiT and a SiT with plain attention have the same keys: between them decide, in this order, ``model`` (what the caller
    believes), the training flags ``args`` of the file, its name and its folders' names, and its weights. Raises ValueError
    with the path for weights of no model known here, for shapes that fit none, and where nothing tells the two apart.
    """
    candidates = [kind for kind, family in FAMILIES.items() if family.is_state(state)]
    if not candidates:
        raise ValueError(f"{path} holds weights of no model known here; the models are {', '.join(CONFIGS)}")
    if len(candidates) == 1:
        return config_of(FAMILIES[candidates[0]], state, path), KEYS_AND_SHAPES
    for text, how in _names(path, model, args):
        named = [kind for kind in candidates if _mentions(text, _name(kind))]
        if len(named) == 1:
            return config_of(FAMILIES[named[0]], state, path), how
    return _by_unused_channels(state, path, candidates), UNUSED_CHANNELS


def config_of(family: Family, state: dict[str, Tensor], path: Path) -> object:
    """Raises ValueError with the path for a state dict that is none of the family's."""
    try:
        return family.config_from_state(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} has the keys of a model like {family.network.__name__}, but weights of other shapes ({error!r})"
        ) from error


def _names(path: Path, model: str | None, args: object) -> Iterator[tuple[str, str]]:
    """What may name the family, and what that is."""
    yield model or "", "--model"
    flags = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(flags, dict):
        yield str(flags.get("model")), "its args"
    for i, part in enumerate(reversed(path.absolute().parts[-NAMING_PARTS:])):
        yield part, "its folder's name" if i else "its file name"


def _mentions(text: str, family: str) -> bool:
    """Written as it is (FastDiT), or otherwise as a word of its own (dit_xl; an edition is no DiT)."""
    return family in text or re.search(rf"(?<![a-z]){family}(?![a-z])", text, re.IGNORECASE) is not None


def _name(kind: type) -> str:
    return FAMILIES[kind].network.__name__


def _by_unused_channels(state: dict[str, Tensor], path: Path, candidates: list[type]) -> object:
    """A transport trains the first half of the 2C channels alone: the others stay the zeros they started with."""
    gaussian, transport = sorted(candidates, key=lambda kind: FAMILIES[kind].objective)
    config = config_of(FAMILIES[gaussian], state, path)
    used, unused = _channels_trained(state, config) if config.learn_sigma else (False, False)
    if used or unused:
        return config if unused else config_of(FAMILIES[transport], state, path)
    raise ValueError(
        f"{path}: its keys fit both {_name(gaussian)} and {_name(transport)}, and nothing in it says which of them it is: "
        f"name it with --model, as --model {_name(gaussian)}-XL/2"
    )


def _channels_trained(state: dict[str, Tensor], config: object) -> tuple[bool, bool]:
    """Whether any row of the output layer is not zero, of the first C channels and of the others."""
    found, shape = [False, False], (config.patch_size**2, 2, config.in_channels)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in state and state[key].shape[:1] == (math.prod(shape),):  # else the weights do not fit, which loading says
            rows = state[key].unflatten(0, shape)  # (p p, half, C, ...)
            found = [found[half] or bool(rows[:, half].any()) for half in (0, 1)]
    return found[0], found[1]
