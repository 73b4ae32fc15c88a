"""Exponential moving average of a model's weights."""

import copy
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.checkpoints import load_weights


class EMA:
    """``model`` holds the average, in eval mode: average <- decay * average + (1 - decay) * weights at each update."""

    def __init__(self, source: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay must be in [0, 1), got {decay}")
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay, self._average = decay, get_ema_multi_avg_fn(decay)
        trained = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
        self._pairs = [
            [parameter for name, parameter in model.named_parameters() if name in trained] for model in (self.model, source)
        ]

    @torch.no_grad()
    def update(self) -> None:
        if self._pairs[0]:
            self._average(*self._pairs, None)

    def hand_over(self) -> Mapping[nn.Parameter, Tensor]:
        """The average of each trained weight, for an optimizer that updates both: from now on :meth:`update` does nothing."""
        averages, weights = self._pairs
        self._pairs = [[], []]
        return dict(zip(weights, averages, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load(self, state: dict[str, Tensor], path: str | os.PathLike) -> None:
        """Raises ValueError, naming ``path``, for weights that do not fit."""
        load_weights(self.model, state, path)
