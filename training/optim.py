"""Optimizers and the learning rate's schedule."""

from collections.abc import Iterable

import timm.optim
import torch
from torch import nn

ADAN_BETAS = (0.98, 0.92, 0.99)  # Xie et al. 2022, as EDT uses it
OPTIMIZERS = ("adan", "adamw", "adan-pytorch")


def create_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """adan: timm's, whose state has the layout of the published checkpoints. adan-pytorch: the package of that name, which
    names the complements of Adan's betas. adamw: torch's, betas (0.9, 0.999)."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    foreach = parameters[0].device.type == "cuda"  # on a CPU the loop is faster
    if name == "adan":
        return timm.optim.Adan(parameters, lr=lr, betas=ADAN_BETAS, weight_decay=weight_decay, foreach=foreach)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, foreach=foreach)
    if name == "adan-pytorch":
        from adan_pytorch import Adan

        return Adan(parameters, lr=lr, betas=tuple(1 - beta for beta in ADAN_BETAS), weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")


def linear_lr(step: int, initial: float, final: float, decay_steps: int) -> float:
    """From ``initial`` at step 0 to ``final`` at ``decay_steps`` and after it; decay_steps 0: constant."""
    if not decay_steps:
        return initial
    return initial + (final - initial) * min(step / decay_steps, 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
