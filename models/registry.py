"""Names of models -> networks."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models import dit, edt, mdt, sit
from models.amm import AMM, default_amm, parse_amm
from models.dit import DIT_CONFIGS, DiT, DiTConfig
from models.edt import EDT, EDT_CONFIGS, EDTConfig
from models.mdt import MDT, MDT_CONFIGS, MDTConfig
from models.sit import SIT_CONFIGS, SiT, SiTConfig


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures a paper gives for ImageNet 256x256; None where it gives none."""

    params_millions: float | None = None
    gmac: float | None = None  # the tables call them GFLOPs
    fid50k_400k: float | None = None  # after 400k steps of batch 256, without guidance
    source: str


PUBLISHED = {
    "EDT-S/2": Published(params_millions=38.3, gmac=2.66, fid50k_400k=34.27, source="EDT paper"),
    "EDT-B/2": Published(params_millions=152.0, gmac=10.20, fid50k_400k=19.18, source="EDT paper"),
    "EDT-XL/2": Published(
        params_millions=708.44, gmac=51.83, fid50k_400k=7.52, source="EDT paper, for depths other than the code's"
    ),
    # Parameters, "FLOPs" and FID: table 4 of the DiT paper.
    "DiT-S/8": Published(params_millions=33.0, gmac=0.36, fid50k_400k=153.60, source="DiT paper"),
    "DiT-S/4": Published(params_millions=33.0, gmac=1.41, fid50k_400k=100.41, source="DiT paper"),
    "DiT-S/2": Published(params_millions=33.0, gmac=6.06, fid50k_400k=68.40, source="DiT paper"),
    "DiT-B/8": Published(params_millions=131.0, gmac=1.42, fid50k_400k=122.74, source="DiT paper"),
    "DiT-B/4": Published(params_millions=130.0, gmac=5.56, fid50k_400k=68.38, source="DiT paper"),
    "DiT-B/2": Published(params_millions=130.0, gmac=23.01, fid50k_400k=43.47, source="DiT paper"),
    "DiT-L/8": Published(params_millions=459.0, gmac=5.01, fid50k_400k=118.87, source="DiT paper"),
    "DiT-L/4": Published(params_millions=458.0, gmac=19.70, fid50k_400k=45.64, source="DiT paper"),
    "DiT-L/2": Published(params_millions=458.0, gmac=80.71, fid50k_400k=23.33, source="DiT paper"),
    "DiT-XL/8": Published(params_millions=676.0, gmac=7.39, fid50k_400k=106.41, source="DiT paper"),
    "DiT-XL/4": Published(params_millions=675.0, gmac=29.05, fid50k_400k=43.01, source="DiT paper"),
    "DiT-XL/2": Published(params_millions=675.0, gmac=118.64, fid50k_400k=19.47, source="DiT paper"),
    "MDTv2-S/2": Published(fid50k_400k=39.50, source="EDT paper, MDTv2 paper"),
    "SiT-S/2": Published(
        params_millions=33.0, gmac=6.06, fid50k_400k=58.61, source="mediator paper; FID in the SiT paper: 57.6"
    ),
    "SiT-S/2 M=4": Published(gmac=5.49, fid50k_400k=57.67, source="mediator paper"),
    "SiT-S/2 M=16": Published(gmac=5.55, fid50k_400k=54.55, source="mediator paper"),
    "SiT-S/2 M=64": Published(gmac=5.78, fid50k_400k=53.57, source="mediator paper"),
    "SiT-XL/2": Published(params_millions=675.0, gmac=118.64, source="DiT paper, whose network it is"),
}

# Rows of the table of models that are no model of their own: label -> name, settings
VARIANTS = {f"SiT-S/2 M={number}": ("SiT-S/2", {"mediator_num": number}) for number in (4, 16, 64)}

VAE_DOWNSAMPLE = 8  # of the published autoencoders: an image is so many times as wide as its latents

STAYS = "this kind of network stays at its resolution: train at the checkpoint's size, or from fresh weights"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between the kinds of network, by the type of their configs."""

    network: type[nn.Module]
    # To know weights that come without their config, as published files do, by keys and shapes; None: they are not known.
    is_state: Callable[[dict], bool] | None = None
    config_from_state: Callable[[dict], object] | None = None
    size_fields: tuple[str, ...] = ("depth", "width", "patch_size")  # what makes a registered model another than the next
    objective: str = "gaussian"  # what published checkpoints were trained for
    other_resolution: str = STAYS  # what to do about a checkpoint of another resolution


FAMILIES = {
    EDTConfig: Family(
        network=EDT,
        is_state=edt.is_edt_state,
        config_from_state=edt.config_from_state,
        size_fields=("widths",),
    ),
    DiTConfig: Family(network=DiT, is_state=dit.is_dit_state, config_from_state=dit.config_from_state),
    MDTConfig: Family(network=MDT, is_state=mdt.is_mdt_state, config_from_state=mdt.config_from_state),
    SiTConfig: Family(
        network=SiT,
        is_state=sit.is_sit_state,
        config_from_state=sit.config_from_state,
        objective="transport",
        other_resolution="to raise a SiT's resolution use attention_mediator/train_256to512.py or train_512to1024.py "
        "(--resume-ckpt-low-resolution)",
    ),
}
CONFIGS = {**EDT_CONFIGS, **DIT_CONFIGS, **MDT_CONFIGS, **SIT_CONFIGS}


def model_names() -> list[str]:
    return list(CONFIGS)


def model_config(name: str, **overrides):
    """The config of a named model with some fields replaced. Raises ValueError for an unknown name, field or value."""
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(CONFIGS)}")
    config = CONFIGS[name]
    unknown = set(overrides) - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}")
    return dataclasses.replace(config, **overrides)


def build_network(config: object, amm: AMM | None = None) -> nn.Module:
    """The network of a config, with fresh weights."""
    return FAMILIES[type(config)].network(config, amm)


def same_size(a: object, b: object) -> bool:
    """Whether two configs are of one registered model, whatever their resolution, classes and other settings."""
    return type(a) is type(b) and size(a) == size(b)


def size(config: object) -> dict:
    return {name: getattr(config, name) for name in FAMILIES[type(config)].size_fields}


def name_of(config: object) -> str | None:
    """The registered model of this size, or None."""
    return next((name for name, known in CONFIGS.items() if same_size(known, config)), None)


def resolve_amm(name: str | None, amm: AMM | str | bool | None, cfg_scale: float = 1.0, input_size: int = 32) -> AMM | None:
    """False or None: off. True: the placement published for the model, None for one without a name. "exp:7,10": as it says."""
    if amm is True:
        return default_amm(name or "this model", cfg_scale, input_size)
    return parse_amm(amm) if isinstance(amm, str) else amm or None


def create_model(name: str, *, amm: AMM | str | bool = False, **overrides) -> nn.Module:
    """Build a network with fresh weights.

    name: one of :func:`model_names`. amm: False, True (the placement published for this model), or for example "exp:7,10".
    overrides: fields of the model's config, such as input_size, in_channels, num_classes; depths, widths, num_heads (EDT);
    decode_layer (MDTv2); mediator_num, mediator_layers (SiT).
    """
    config = model_config(name, **overrides)
    return build_network(config, resolve_amm(name, amm, input_size=config.input_size))
