"""What several test files share: the golden numbers and how near one must come, weights of no zeros, grey levels, files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

GOLDEN = Path(__file__).parent / "golden"


def golden_arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_network(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state dict, inputs and outputs)."""
    arrays, prefix = golden_arrays(name), "state_dict/"
    state = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return state, {key: value for key, value in arrays.items() if not key.startswith(prefix)}


def match(actual, expected) -> None:
    """Within the golden numbers' tolerance."""
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def perturb(model: nn.Module, scale: float) -> nn.Module:
    """Add normal draws to every trained weight, so that those which start as zeros contribute too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two sets of images."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())
