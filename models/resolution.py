"""A SiT checkpoint at another resolution (mediator paper: training continues from 256 to 512 to 1024 pixels)."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoints import differences, summary
from models.layers import sincos_table
from models.sit import SiT, SiTConfig

# The mediators' tables with one value for each row (h) or column (w) of the grid: name -> axis.
GRID_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}


def change_resolution(
    state: dict[str, Tensor], config: SiTConfig, input_size: int
) -> tuple[dict[str, Tensor], SiTConfig, list[str]]:
    """(state, config, report) of the same network for latents ``input_size`` wide.

    The position table is computed anew, the mediators' row and column biases are resized linearly with their end points kept,
    all else is passed on as it is. report: a line for each kind of tensor that changed.
    Raises ValueError for another network than a SiT, a state that does not fit its config, and a size the network cannot have.
    """
    if not isinstance(config, SiTConfig):
        raise ValueError(f"only a SiT can change its resolution, this is {type(config).__name__.removesuffix('Config')}")
    new_config = dataclasses.replace(config, input_size=input_size)
    with torch.device("meta"):
        problems = differences(SiT(config).state_dict(), state)
    if problems:
        raise ValueError(f"the state does not fit its config: {summary(problems)}")
    if new_config.grid == config.grid:
        return dict(state), new_config, []
    new_state = dict(state)
    new_state["pos_embed"] = sincos_table(config.width, new_config.grid).to(state["pos_embed"])
    report = [f"pos_embed: {_shapes(state, new_state, 'pos_embed')}, computed anew"]
    for name, axis in GRID_AXES.items():
        keys = [key for key in state if key.endswith(f".attn.{name}")]
        for key in keys:
            new_state[key] = _resized(state[key], axis, new_config.grid)
        if keys:
            shapes = _shapes(state, new_state, keys[0])
            report.append(f"blocks.*.attn.{name}: {len(keys)} of {shapes}, resized linearly, end points kept")
    return new_state, new_config, report


def _resized(table: Tensor, axis: int, size: int) -> Tensor:
    """Linear interpolation along one axis between samples at its end points (align_corners=True)."""
    lines = table.movedim(axis, -1)
    lead = lines.shape[:-1]
    out = F.interpolate(lines.reshape(1, -1, lines.shape[-1]), size, mode="linear", align_corners=True)
    return out.reshape(*lead, size).movedim(-1, axis).contiguous()


def _shapes(state: dict[str, Tensor], new_state: dict[str, Tensor], key: str) -> str:
    return f"{tuple(state[key].shape)} -> {tuple(new_state[key].shape)}"
