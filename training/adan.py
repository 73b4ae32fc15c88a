"""Adan's step as one compiled pass over memory, for CPUs, where timm's loop reads and writes every state several times."""

import math
from collections.abc import Iterable, Mapping, Sequence

import timm.optim
import torch
from torch import Tensor, nn

WARM_UP_NUMBERS = 2**20  # enough for the compiler to divide the loop among threads, as it then does for every size
STATE = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")


class CompiledAdan(timm.optim.Adan):
    """timm's Adan, with its state and settings, within rounding; one graph serves tensors of any size above 1 and any step.

    averages: of each weight an average that is updated with it, while it is in the cache: average <- average_decay * average +
    (1 - average_decay) * weight. Compiles when it is made. Weights and states must be contiguous, in float32, on the CPU.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], averages: Mapping[nn.Parameter, Tensor], average_decay: float, **settings
    ):
        super().__init__(parameters, foreach=False, **settings)
        self._averages, self._average_decay = averages, average_decay
        self._update = torch.compile(_update, fullgraph=True, dynamic=True)
        for group in self.param_groups:
            self._apply([torch.zeros(WARM_UP_NUMBERS) for _ in range(3 + len(STATE))], {**group, "step": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A weight without a gradient stays, and its average still follows it."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                average = self._averages[weight]
                if weight.grad is None:
                    average.lerp_(weight, 1 - self._average_decay)
                    continue
                state = self._state_of(weight, first=group["step"] == 1)
                self._apply([weight, weight.grad.contiguous(), *(state[name] for name in STATE), average], group)

    @torch.no_grad()
    def _apply(self, tensors: Sequence[Tensor], group: dict) -> None:
        # The graph is made for one dimension; of a view it would also look at the dimensions of what it is a view of.
        flat = [tensor.view(-1).data for tensor in tensors]
        self._update(*flat, self._factors(group), *group["betas"], group["eps"])

    def _state_of(self, weight: nn.Parameter, first: bool) -> dict[str, Tensor]:
        state = self.state[weight]
        for name in STATE[:3]:
            if name not in state:
                state[name] = torch.zeros_like(weight)
        if first or "neg_pre_grad" not in state:
            state["neg_pre_grad"] = -weight.grad
        return state

    def _factors(self, group: dict) -> Tensor:
        """What differs from step to step, as a tensor: numbers would be compiled in."""
        step, lr = group["step"], group["lr"]
        corrections = [1 - beta**step for beta in group["betas"]]
        return torch.tensor(
            [
                lr / corrections[0],
                lr * group["betas"][1] / corrections[1],
                math.sqrt(corrections[2]),
                1 + lr * group["weight_decay"],
                1 - self._average_decay,
            ]
        )


def _update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    mean_difference: Tensor,
    mean_square: Tensor,
    negative_previous: Tensor,
    average: Tensor,
    factors: Tensor,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
) -> None:
    """Xie et al. 2022, algorithm 1; the betas are one minus the paper's. Tensors are (n,); all but the gradient change."""
    step_size, step_size_difference, correction, decay, average_weight = factors.unbind()
    difference = gradient + negative_previous
    mean.add_((gradient - mean) * (1 - beta1))
    mean_difference.mul_(beta2).add_(difference * (1 - beta2))
    looked_ahead = gradient + beta2 * difference
    mean_square.mul_(beta3).add_(looked_ahead * looked_ahead * (1 - beta3))
    negative_previous.copy_(-gradient)
    denominator = mean_square.sqrt() / correction + eps
    weight.sub_(step_size * mean / denominator).sub_(step_size_difference * mean_difference / denominator).div_(decay)
    average.add_((weight - average) * average_weight)
