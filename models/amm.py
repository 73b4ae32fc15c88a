"""The Attention Modulation Matrix (AMM) of EDT: training-free, switched on for sampling in a few chosen blocks.

The softmax output A of a block is multiplied element-wise by a fixed matrix M that falls with the distance of two tokens,
WITHOUT renormalising, before it meets the values. See ``models.attention`` for how that runs through a fused kernel.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["exp", "cos"]


@dataclass(frozen=True, kw_only=True)
class AMM:
    """Which blocks (flat index) are modulated, and the form of the matrix."""

    form: Form
    blocks: tuple[int, ...]

    def __post_init__(self):
        if self.form not in ("exp", "cos"):
            raise ValueError(f"AMM has the forms exp and cos, got {self.form!r}")
        if not self.blocks:
            raise ValueError("AMM needs at least one block index")

    def check(self, allowed: range) -> None:
        """Raises ValueError for a block that cannot have AMM in the model, whose allowed ones these are."""
        if not set(self.blocks) <= set(allowed):
            could = f"{allowed[0]} to {allowed[-1]}" if allowed else "none"
            raise ValueError(f"AMM at block(s) {self.blocks}: of this model's blocks, those that can have it are {could}")

    def __str__(self) -> str:
        return f"{self.form}:{','.join(map(str, self.blocks))}"


def form_at(amm: AMM | None, block: int) -> Form | None:
    """What a block's attention is modulated by; None: by nothing."""
    return amm.form if amm and block in amm.blocks else None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A published placement: the model's blocks to modulate for guidance scales up to ``max_cfg_scale``."""

    amm: str
    max_cfg_scale: float = math.inf
    min_input_size: int = 0


PLACEMENTS: dict[str, tuple[Placement, ...]] = {  # the EDT paper and its released code; the first row that fits is used
    "EDT-S/2": (
        Placement(amm="cos:10", min_input_size=64),  # 512-pixel images
        Placement(amm="exp:7,10", max_cfg_scale=1.5),
        Placement(amm="exp:8"),
    ),
    "EDT-B/2": (Placement(amm="exp:7,10", max_cfg_scale=1.5), Placement(amm="exp:8")),
    "EDT-XL/2": (Placement(amm="exp:23,25"),),  # exp:24 is the published alternative
    "DiT-XL/2": (Placement(amm="exp:15,17,19,22,24"),),
    "DiT-S/2": (Placement(amm="exp:8,10"),),
    "MDTv2-S/2": (Placement(amm="exp:8"),),
    "EDT-Ti/2": (Placement(amm="exp:4"),),  # ours: the block of stage 3, as block 7 of S
}


def default_amm(model_name: str, cfg_scale: float = 1.0, input_size: int = 32) -> AMM:
    """The published placement for a model, guidance scale and latent side. Raises ValueError where none is published."""
    for placement in PLACEMENTS.get(model_name, ()):
        if cfg_scale <= placement.max_cfg_scale and input_size >= placement.min_input_size:
            return parse_amm(placement.amm)
    raise ValueError(f"no AMM placement is published for {model_name}: name the blocks, for example amm='exp:7,10'")


def parse_amm(text: str) -> AMM:
    """``"exp:7,10"`` or ``"cos:10"`` -> AMM."""
    form, _, blocks = text.partition(":")
    try:
        return AMM(form=form, blocks=tuple(int(block) for block in blocks.split(",")))
    except ValueError as error:
        raise ValueError(
            f"amm={text!r} is not understood ({error}): write FORM:BLOCK,BLOCK, for example exp:7,10 or cos:10"
        ) from None


MAXIMA = {"exp": 0.5 * math.e, "cos": 1.3}  # of M: its diagonal


def amm_matrix(grid: int, form: Form, dtype: torch.dtype = torch.float32) -> Tensor:
    """M, (N, N) for a grid x grid map of tokens.

    With d the Euclidean distance of two tokens and f = 2 pi / (4 (grid-1) sqrt 2), so that f*d reaches pi/2 at opposite
    corners: exp form 0.5 exp(cos(f d)), cos form 1.3 cos(f d). Tokens farther apart than token 0 and token 3*grid-1 get 0.
    Raises ValueError for grid < 2, where no two tokens exist.
    """
    if grid < 2:
        raise ValueError(f"AMM needs a token grid of side 2 or more, got {grid}")
    coordinates = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))  # (N, 2): row, column
    squared = (coordinates[:, None] - coordinates[None]).square().sum(-1)  # exact: integers
    cosine = torch.cos(2 * math.pi / (4 * (grid - 1) * math.sqrt(2)) * squared.double().sqrt())
    # At opposite corners cos(pi/2) is 6e-17 or -6e-17 by rounding; the matrix has no negative entries.
    matrix = 0.5 * cosine.exp() if form == "exp" else 1.3 * cosine.clamp(min=0.0)
    return matrix.masked_fill(squared > (grid - 1) ** 2 + 4, 0.0).to(dtype)
