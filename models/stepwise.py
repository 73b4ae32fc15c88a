"""Step-wise switching between networks (Pu et al. 2024, "Efficient Diffusion Transformer with Step-wise Dynamic Attention
Mediators"): sampling starts with the cheapest network and moves on to the next as soon as the states hardly change any more.

Every sample of a batch decides for itself, so it gets what it would get alone. The published code decides on the mean of the
batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

DISTANCES = {"mae": torch.abs, "mse": torch.square}  # of the elementwise difference, then the mean over the sample


@dataclass(frozen=True, kw_only=True)
class SwitchPolicy:
    """When a sample moves on from one network to the next.

    ratios: one for each switch, so one fewer than there are networks: the switch happens at the first distance between
    neighbouring states that is strictly below ratio * reference. They must not grow; between two equal ratios lies a network
    that is never called. first_several_num: how many distances the reference is the mean of. distance: "mae" or "mse".
    Raises ValueError for anything else.
    """

    ratios: tuple[float, ...]
    first_several_num: int = 3
    distance: str = "mae"

    def __post_init__(self):
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if not all(0 < ratio < math.inf for ratio in self.ratios):
            raise ValueError(f"the switch ratios must be positive and finite, got {self.ratios}")
        ordered = tuple(sorted(self.ratios, reverse=True))
        if self.ratios != ordered:
            raise ValueError(
                f"the switch ratios {self.ratios} are in the wrong order: the distances shrink while sampling, so a later "
                f"ratio must not be larger than an earlier one; did you mean {ordered}?"
            )
        if not isinstance(self.first_several_num, int) or self.first_several_num < 1:
            raise ValueError(f"first_several_num must be a whole number of at least 1, got {self.first_several_num}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")

    @property
    def num_stages(self) -> int:
        return len(self.ratios) + 1


def _mean_of_rows(rows: Tensor) -> Tensor:
    """(B, N) -> (B,). Halves are added up elementwise, since the order of a reduction may depend on B."""
    count = rows.shape[1]
    rows = pad(rows, (0, (1 << (count - 1).bit_length()) - count))
    while rows.shape[1] > 1:
        left, right = rows.chunk(2, dim=1)
        rows = left + right
    return rows[:, 0] / count


class StageTracker:
    """Which network each sample of the current batch is at.

    With x_i the state after solver step i and delta_i = distance(x_{i+1}, x_i), i >= 1, the reference of a sample is the mean
    of its delta_1 .. delta_K, K = first_several_num; from delta_{K+1} on, that is after solver step K + 2, it switches
    wherever delta < ratio * reference. Several switches may happen after one step. The step from the initial noise to x_1
    does not count.
    """

    def __init__(self, policy: SwitchPolicy):
        self.policy = policy
        self._ratios = torch.tensor(policy.ratios, dtype=torch.float64)
        self.begin(0)

    def begin(self, batch_size: int) -> None:
        """Put batch_size new samples at the first network."""
        self.batch_size = batch_size
        self.num_steps = 0
        # (B, num_stages - 1): [b, i] is the solver step after which sample b left network i, -1 while it has not.
        self.switch_steps = torch.full((batch_size, len(self._ratios)), -1)
        self._previous: Tensor | None = None
        self._reference: Tensor | None = None
        self._pending: list[Tensor] = []  # distances still on the device: waiting for them would stall it

    @property
    def stages(self) -> Tensor:
        """(B,) int64 on the CPU: the network each sample is at, from 0."""
        return (self.switch_steps >= 0).sum(dim=1)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in the state after a solver step, x_1 first.

        x: (B, ...), or (2B, ...) of which the first, conditional, half counts. The separate last step of an SDE is no solver
        step: a switch entered after it has no effect. Raises ValueError for another number of samples than begun.
        """
        if self.batch_size < 1 or len(x) not in (self.batch_size, 2 * self.batch_size):
            raise ValueError(f"a state of {len(x)} samples in a batch of {self.batch_size}: call begin(batch_size) first")
        self.num_steps += 1
        if (self.switch_steps >= 0).all():  # at the last network: nothing is left to decide
            return
        state = x[: self.batch_size].to(torch.float32, copy=True)  # a copy: solvers may work in place
        previous, self._previous = self._previous, state
        if previous is None:
            return
        self._pending.append(_mean_of_rows(DISTANCES[self.policy.distance](state - previous).flatten(1)))
        if self._reference is not None or len(self._pending) > self.policy.first_several_num:
            self._decide()

    def _decide(self) -> None:
        # In float64 the mean of equal distances is that distance: a ratio of 1 does not switch on rounding.
        *first, delta = torch.stack(self._pending).cpu().double()
        self._pending.clear()
        if first:
            self._reference = torch.stack(first).mean(dim=0)
        # The ratios do not grow, so the switches a distance allows are a prefix of all: none can be taken before its turn.
        below = delta[:, None] < self._ratios * self._reference[:, None]  # (B, num_stages - 1)
        self.switch_steps[below & (self.switch_steps < 0)] = self.num_steps


class StepwiseNetwork(nn.Module):
    """Several networks that are called as one: each sample goes to the network it is at.

        stepwise.begin(batch_size)
        for out in sampler_steps(stepwise, ...):  # lazy: the next call of the network comes after observe
            stepwise.observe(out["sample"])

    models: the networks in the order of use, of one input size, number of channels and number of classes; they may differ in
    everything else. Raises ValueError where they do not, or are not as many as the policy has stages.

    calls and evaluations, both (B, num_stages) int64 on the CPU, count since begin what each network did for each sample: a
    guided pair is one call and two evaluations. The cost of a sample in MACs is evaluations @ MACs per network.
    """

    def __init__(self, models: Sequence[nn.Module], policy: SwitchPolicy):
        super().__init__()
        if len(models) != policy.num_stages:
            raise ValueError(
                f"{len(models)} models need {len(models) - 1} switch ratio(s), one fewer than models; got {policy.ratios}"
            )
        self.config = models[0].config
        for name in ("input_size", "in_channels", "num_classes", "out_channels"):
            values = [getattr(model.config, name, None) for model in models]
            if len(set(values)) > 1:
                raise ValueError(f"the models of a step-wise network must agree in {name}, got {values}")
        self.models = nn.ModuleList(models)
        self.tracker = StageTracker(policy)
        self.begin(0)

    def begin(self, batch_size: int) -> None:
        """Start a batch: every sample at the first network, all counts zero."""
        self.tracker.begin(batch_size)
        self.calls = torch.zeros(batch_size, len(self.models), dtype=torch.int64)
        self.evaluations = torch.zeros_like(self.calls)

    @property
    def cfg_power(self) -> float:
        """The power-cosine of guidance that the networks were published with, 0 for none."""
        return getattr(self.models[0], "cfg_power", 0.0)

    def observe(self, x: Tensor) -> None:
        """See :meth:`StageTracker.observe`."""
        self.tracker.observe(x)

    @property
    def stages(self) -> Tensor:
        """See :attr:`StageTracker.stages`."""
        return self.tracker.stages

    @property
    def switch_steps(self) -> Tensor:
        """(B, num_stages - 1) int64 on the CPU: the solver step after which each sample went on to network i + 1, -1 where it
        never did."""
        return self.tracker.switch_steps

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, S, S), t (B,) and y (B,) as the networks take them; or 2B of each, where both halves follow the sample."""
        rows, batch_size = len(x), self.tracker.batch_size
        if batch_size < 1 or rows not in (batch_size, 2 * batch_size):
            raise ValueError(f"{rows} samples in a batch of {batch_size}: call begin(batch_size) first")
        stages, halves = self.stages, rows // batch_size
        self.calls[torch.arange(batch_size), stages] += 1
        self.evaluations[torch.arange(batch_size), stages] += halves
        if (stages == stages[0]).all():
            return self.models[stages[0]](x, t, y)
        stages = stages.repeat(halves)
        counts = stages.bincount(minlength=len(self.models)).tolist()
        order = stages.argsort(stable=True).to(x.device)  # stable: a group keeps its halves one after the other
        groups = zip(self.models, *(value[order].split(counts) for value in (x, t, y)), strict=True)
        parts = [model(*group) for model, *group in groups if len(group[0])]
        return torch.cat(parts)[order.argsort()]
