"""Names of models -> networks."""

import dataclasses
from dataclasses import dataclass

from torch import nn

from models.amm import AMM, default_amm, parse_amm
from models.edt import EDT, EDT_CONFIGS, EDTConfig


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
}

NETWORKS = {EDTConfig: EDT}
CONFIGS = {**EDT_CONFIGS}


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
    return NETWORKS[type(config)](config, amm)


def resolve_amm(name: str, amm: AMM | str | bool | None, cfg_scale: float = 1.0, input_size: int = 32) -> AMM | None:
    """False or None: off. True: the placement published for the model. "exp:7,10": as it says."""
    if amm is True:
        return default_amm(name, cfg_scale, input_size)
    return parse_amm(amm) if isinstance(amm, str) else amm or None


def create_model(name: str, *, amm: AMM | str | bool = False, **overrides) -> nn.Module:
    """Build a network with fresh weights.

    name: one of :func:`model_names`. amm: False, True (the placement published for this model), or for example "exp:7,10".
    overrides: fields of the model's config, such as input_size, in_channels, num_classes, depths, widths, num_heads.
    """
    config = model_config(name, **overrides)
    return build_network(config, resolve_amm(name, amm, input_size=config.input_size))
