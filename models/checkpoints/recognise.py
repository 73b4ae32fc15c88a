"""Which network a state dict is of."""

import argparse
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from models.checkpoints.files import naming
from models.registry import FAMILIES, Family, name_of

KEYS_AND_SHAPES = "keys and shapes"
UNUSED_CHANNELS = "its unused channels"
NAMING_PARTS = 3  # of a path: <index>-<model>/checkpoints/<step>.pt


def recognise(state: dict[str, Tensor], path: Path, *, model: str | None = None, args: object = None) -> tuple[object, str]:
    """(config, how it was recognised).

    A DiT and a SiT with plain attention have the same keys: between them decide, in this order, ``model`` (what the caller
    believes), the training flags ``args`` of the file, and its weights together with its name and its folders' names. Raises
    ValueError with the path for weights of no model known here, for shapes that fit none, where nothing tells the two apart,
    and where weights and names contradict one another.
    """
    candidates = [kind for kind, family in FAMILIES.items() if family.is_state and family.is_state(state)]
    if not candidates:
        some = ", ".join([*map(str, state)][:3])
        raise ValueError(f"{path} holds weights of no model known here, as {some}: the models are {_families(FAMILIES)}")
    if len(candidates) == 1:
        return config_of(FAMILIES[candidates[0]], state, path), KEYS_AND_SHAPES
    configs = {kind: config_of(FAMILIES[kind], state, path) for kind in candidates}
    believed = _named(candidates, [(model or "", "--model"), (str(flags_of(args).get("model")), "its args")])
    if believed:
        kind, how = believed
        return configs[kind], how
    named, proven = _named(candidates, _file_names(path)), _by_unused_channels(state, configs)
    mend = _mend(configs)
    if named and proven and named[0] is not proven:
        raise ValueError(f"{path} is a {_name(named[0])} by {named[1]}, a {_name(proven)} by {UNUSED_CHANNELS}: {mend}")
    if proven:
        return configs[proven], UNUSED_CHANNELS
    if named:
        return configs[named[0]], named[1]
    raise ValueError(f"{path}: its keys fit both {_families(candidates, ' and ')}, and nothing in it says which it is: {mend}")


def flags_of(args: object) -> dict:
    """The training flags in a file, in either form; empty for anything else."""
    flags = vars(args) if isinstance(args, argparse.Namespace) else args
    return flags if isinstance(flags, dict) else {}


def config_of(family: Family, state: dict[str, Tensor], path: Path) -> object:
    """Raises ValueError with the path for a state dict that is none of the family's."""
    with naming(path, f"a model like {family.network.__name__}", "weights of other shapes"):
        return family.config_from_state(state)


def _named(candidates: list[type], texts: Iterable[tuple[str, str]]) -> tuple[type, str] | None:
    """The one candidate that the first telling text names, and what that text is."""
    for text, how in texts:
        named = [kind for kind in candidates if _mentions(text, _name(kind))]
        if len(named) == 1:
            return named[0], how
    return None


def _file_names(path: Path) -> Iterator[tuple[str, str]]:
    for i, part in enumerate(reversed(path.absolute().parts[-NAMING_PARTS:])):
        yield part, "its folder's name" if i else "its file name"


def _mentions(text: str, family: str) -> bool:
    """Written as it is (FastDiT), or otherwise as a word of its own (dit_xl; an edition is no DiT)."""
    return family in text or re.search(rf"(?<![a-z]){family}(?![a-z])", text, re.IGNORECASE) is not None


def _name(kind: type) -> str:
    return FAMILIES[kind].network.__name__


def _families(kinds: Iterable[type], joined: str = ", ") -> str:
    return joined.join(map(_name, kinds))


def _mend(configs: dict[type, object]) -> str:
    names = [name_of(config) for config in configs.values()]
    if None in names:  # --model takes registered sizes only
        return f"rename the file so that its own name says {_families(configs, ' or ')}"
    return f"say which with --model {' or --model '.join(names)}"


def _by_unused_channels(state: dict[str, Tensor], configs: dict[type, object]) -> type | None:
    """A transport trains the first half of the 2C channels alone: the others stay the zeros they started with. None where
    there are no others, or all are zeros."""
    gaussian, transport = sorted(configs, key=lambda kind: FAMILIES[kind].objective)
    config = configs[gaussian]
    used, unused = _channels_trained(state, config) if config.learn_sigma else (False, False)
    if unused:
        return gaussian
    return transport if used else None


def _channels_trained(state: dict[str, Tensor], config: object) -> tuple[bool, bool]:
    """Whether any row of the output layer is not zero, of the first C channels and of the others."""
    found, shape = [False, False], (config.patch_size**2, 2, config.in_channels)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in state and state[key].shape[:1] == (math.prod(shape),):  # else the weights do not fit, which loading says
            rows = state[key].unflatten(0, shape)  # (p p, half, C, ...)
            found = [found[half] or bool(rows[:, half].any()) for half in (0, 1)]
    return found[0], found[1]
