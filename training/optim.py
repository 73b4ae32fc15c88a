"""Optimizers and the learning rate's schedule."""

from collections.abc import Iterable

import timm.optim
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from training.adan import CompiledAdan
from training.ema import EMA

ADAN_BETAS = (0.98, 0.92, 0.99)  # Xie et al. 2022, as EDT uses it
OPTIMIZERS = ("adan", "adamw", "adan-pytorch")


def create_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, compile_with: EMA | None = None
) -> torch.optim.Optimizer:
    """adan: timm's, whose state has the layout of the published checkpoints. adan-pytorch: the package of that name, which
    names the complements of Adan's betas. adamw: torch's, betas (0.9, 0.999).

    compile_with: adan's step is compiled where that is faster, on a CPU, and then updates this average of the parameters too.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    device, sharded = parameters[0].device.type, isinstance(parameters[0], DTensor)
    foreach = device == "cuda"  # on a CPU the loop is faster
    if name == "adan":
        settings = {"lr": lr, "betas": ADAN_BETAS, "weight_decay": weight_decay}
        if compile_with and device == "cpu" and not sharded:
            return CompiledAdan(parameters, compile_with.hand_over(), compile_with.decay, **settings)
        return timm.optim.Adan(parameters, foreach=foreach, **settings)
    if name == "adamw":
        by_device = {"fused": True} if device == "cpu" and not sharded else {"foreach": foreach}
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **by_device)
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
