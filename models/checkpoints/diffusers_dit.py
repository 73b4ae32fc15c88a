"""DiTs that diffusers saved: their keys -> ours, and what the pipeline's folder says.

diffusers keeps a copy of the timestep and the label embedding in every block; a DiT has one of each. diffusers' sinusoid has
exponents over 127, where DiT, and this code, divides by 128: its own samples of the same weights are others.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints.files import PIPELINE_NETWORK, naming
from models.dit import DiTConfig, count_blocks, usual_heads
from models.layers import sincos_table, sizes_from_state

VAE_SCALE = 0.18215  # where an AutoencoderKL's config.json states none
TABLE, FILE_TABLE = "pos_embed", "pos_embed.pos_embed"
CLASS_TABLE = "y_embedder.embedding_table.weight"

# Names without .weight and .bias: diffusers' -> ours
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
JOINED = {("attn1.to_q", "attn1.to_k", "attn1.to_v"): "attn.qkv"}  # one below the other
EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
LABEL_EMBEDDER = "norm1.emb.class_embedder.embedding_table.weight"

# config.json: what must be so, where it is stated, for the network to be a DiT
SETTINGS = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}


@dataclass(frozen=True, kw_only=True)
class DiffusersDiT:
    state: dict[str, Tensor]  # with our keys
    config: DiTConfig
    codec: dict
    class_names: tuple[str, ...]


def is_diffusers_state(state: dict[str, Tensor]) -> bool:
    return "pos_embed.proj.weight" in state and f"transformer_blocks.0.{LABEL_EMBEDDER}" in state


def read_diffusers(state: dict[str, Tensor], file: Path) -> DiffusersDiT:
    """file: holds the state; beside it may lie config.json, and around it the pipeline.

    Raises ValueError for keys of another network, for copies of an embedder that differ, and where neither the weights nor
    config.json tell the number of heads or the resolution.
    """
    stated = _read_json(file.with_name("config.json"))
    for key, value in SETTINGS.items():
        if stated.get(key, value) != value:
            raise ValueError(f"{file}: its config.json has {key} {stated[key]}, a DiT has {value}")
    renamed = rename(state, file)
    with naming(file, "a diffusers DiT", "weights or settings of another kind"):
        config = _config(renamed, stated)
    pipeline = file.parent.parent if file.parent.name == PIPELINE_NETWORK else None
    return DiffusersDiT(
        state=renamed,
        config=config,
        codec=_codec(pipeline) if pipeline else {},
        class_names=_class_names(_read_json(pipeline / "model_index.json"), config.num_classes) if pipeline else (),
    )


def rename(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """diffusers' keys -> ours. Raises ValueError for a missing or a foreign key, and for embedders that differ."""
    rest, renamed = dict(state), {}

    def take(key: str) -> Tensor:
        if key not in rest:
            raise ValueError(f"{file} looks like a diffusers DiT, but lacks {key}")
        return rest.pop(key)

    for theirs, ours in OUTSIDE.items():
        for kind in ("weight", "bias"):
            renamed[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    for i in range(count_blocks(state, "transformer_blocks")):
        block = f"transformer_blocks.{i}"
        for kind in ("weight", "bias"):
            for theirs, ours in IN_BLOCK.items():
                renamed[f"blocks.{i}.{ours}.{kind}"] = take(f"{block}.{theirs}.{kind}")
            for parts, ours in JOINED.items():
                renamed[f"blocks.{i}.{ours}.{kind}"] = torch.cat([take(f"{block}.{part}.{kind}") for part in parts])
        embedders = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in EMBEDDERS.items() for kind in ("weight", "bias")}
        for theirs, ours in {**embedders, LABEL_EMBEDDER: CLASS_TABLE}.items():
            copy = take(f"{block}.{theirs}")
            if not torch.equal(renamed.setdefault(ours, copy), copy):
                raise ValueError(
                    f"{file}: {block}.{theirs} differs from block 0's; a DiT has one embedder for all blocks, and diffusers' "
                    "copies of it must be equal"
                )
    if FILE_TABLE in rest:
        renamed[TABLE] = rest.pop(FILE_TABLE)
    if rest:
        raise ValueError(f"{file} looks like a diffusers DiT, but holds {min(rest)}, which no DiT has")
    return renamed


def _config(state: dict[str, Tensor], stated: dict) -> DiTConfig:
    """From the shapes, of which config.json, where there is one, may say nothing else; the heads are in it alone.

    Adds the position table to the state where the file holds none.
    """
    stated_size = {}
    if TABLE not in state:
        width, _, patch_size, _ = state["x_embedder.proj.weight"].shape
        side = stated.get("sample_size")
        if side is None:
            raise ValueError("neither it nor a config.json beside it tells the resolution (sample_size): lay config.json there")
        state[TABLE] = sincos_table(width, side // patch_size)
        stated_size["input_size"] = side  # the patches may not divide it, which the config tells
    sizes, depth = sizes_from_state(state) | stated_size, count_blocks(state)
    heads = stated.get("num_attention_heads") or usual_heads(sizes["width"])
    found = {
        "num_layers": depth,
        "in_channels": sizes["in_channels"],
        "patch_size": sizes["patch_size"],
        "out_channels": len(state["final_layer.linear.bias"]) // sizes["patch_size"] ** 2,
        "num_embeds_ada_norm": sizes["num_classes"],
        "sample_size": sizes["input_size"],
        "attention_head_dim": sizes["width"] // heads,
    }
    for key, value in found.items():
        if stated.get(key) is not None and stated[key] != value:
            raise ValueError(f"its config.json says {key} {stated[key]}, its weights have {value}")
    return DiTConfig(depth=depth, num_heads=heads, **sizes)


def _codec(pipeline: Path) -> dict:
    """Of the pipeline's own decoder."""
    folder = pipeline / "vae"
    if not (folder / "config.json").is_file():
        return {}
    scale = _read_json(folder / "config.json").get("scaling_factor", VAE_SCALE)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"{folder / 'config.json'} has scaling_factor {scale!r:.100}: it must be a number above 0")
    return {"name": str(folder.resolve()), "scale": scale}


def _class_names(index: dict, num_classes: int) -> tuple[str, ...]:
    names = index.get("id2label")
    if not isinstance(names, dict) or not names:
        return ()
    return tuple(str(names.get(str(i), i)) for i in range(num_classes))


def _read_json(path: Path) -> dict:
    """Empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the settings of a diffusers model")
    return content
