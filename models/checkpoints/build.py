"""Checkpoints -> networks."""

import math
import os

import torch
from torch import Tensor, nn

from models.amm import AMM
from models.checkpoints.read import Checkpoint
from models.macs import fresh_on_meta
from models.registry import FAMILIES, VAE_DOWNSAMPLE, build_network, model_config, resolve_amm, same_size, size


def build_model(
    checkpoint: Checkpoint, *, name: str | None = None, amm: AMM | str | bool | None = False, cfg_scale: float = 1.0
) -> nn.Module:
    """The network of a checkpoint, in eval mode, with its weights.

    name: what the user believes it is; ValueError where the file holds another model. amm: as in :func:`models.create_model`;
    True takes the placement published for this model and guidance scale.
    """
    check_name(checkpoint, name)
    amm = resolve_amm(name or checkpoint.model, amm, cfg_scale, checkpoint.config.input_size)
    check_fit(checkpoint)  # before memory is taken for sizes that the file states and its weights do not have
    model = build_network(checkpoint.config, amm)
    load_weights(model, checkpoint.state, checkpoint.path)
    return model.eval()


def check_name(checkpoint: Checkpoint, name: str | None) -> None:
    """Raises ValueError where the file holds another model than the named one; None names nothing."""
    if name is None:
        return
    asked = model_config(name)
    if name != checkpoint.model and not same_size(asked, checkpoint.config):
        sizes = " and ".join(f"{field} {value}" for field, value in size(checkpoint.config).items())
        held = checkpoint.model or f"a model of {sizes}"
        raise ValueError(f"{checkpoint.path} holds {held}, not {name}: leave the model's name out, or pass the right file")


def check_fit(checkpoint: Checkpoint) -> None:
    """Raises ValueError where the weights have other shapes than the network of the checkpoint's config; takes no memory."""
    try:
        network = fresh_on_meta(checkpoint.config)
    except (RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint.path}: no network has the sizes that it states ({reason})") from error
    check_shapes(network, checkpoint.state, checkpoint.path)


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """``load_state_dict``, strictly, with a ValueError that names the file and the first differences, or the resolutions.

    Index buffers must hold the values that the model computes: other ones are another network's.
    """
    check_shapes(model, state, path)
    check_index_buffers(model, state, path)
    model.load_state_dict(state)


def check_shapes(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raises ValueError with the resolutions, or the first differences."""
    _check_resolution(model, state, path)
    problems = differences(model.state_dict(), state)
    if problems:
        raise ValueError(f"{path} does not fit the model: {summary(problems)}")


def check_index_buffers(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    for key, buffer in model.named_buffers():
        if key in state and not buffer.is_floating_point() and not torch.equal(buffer.cpu(), state[key].cpu().to(buffer.dtype)):
            raise ValueError(
                f"{path} does not fit the model: {key} holds other values than this network's, which are constants"
            )


def differences(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """How the keys, shapes and kinds of number of a state dict differ from those of a model's, a line each."""
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not a weight of this model" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model's is {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [
        f"{key} is {state[key].dtype}, the model's is {value.dtype}".replace("torch.", "")
        for key, value in expected.items()
        if key in state and state[key].is_floating_point() != value.is_floating_point()
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
    pixels, wanted_pixels = VAE_DOWNSAMPLE * held, VAE_DOWNSAMPLE * wanted
    raise ValueError(
        f"{path} holds the position tables of latents {held} wide (with a VAE of {VAE_DOWNSAMPLE}: {pixels}-pixel images), "
        f"the model's are {wanted} wide ({wanted_pixels} pixels): {FAMILIES[type(config)].other_resolution}"
    )
