"""One optimizer step on the global batch: the piece that every training script shares."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion import GaussianDiffusion
from diffusion.timesteps import ContinuousSampler, UniformSampler
from diffusion.transport import Transport
from runtime.draws import Purpose, uniforms
from training.data import Batch
from training.ema import EMA
from training.optim import set_lr

PARTS = ("loss", "mse", "vb", "loss_plain", "loss_masked")  # mse and vb: of Gaussian diffusion only


@dataclass
class TrainingStep:
    """Draw timesteps, predict, go back, update weights, EMA and the timestep sampler.

    model and optimizer are as accelerate prepared them. share: this process's positions in the global batch. micro_batch_size:
    samples that go through the network at once (each twice with a masked pass); the gradient is that of the whole batch.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    diffusion: GaussianDiffusion | Transport
    timestep_sampler: UniformSampler | ContinuousSampler
    seed: int
    global_batch_size: int
    share: Sequence[int]
    micro_batch_size: int

    def __call__(self, step: int, batch: Batch, lr: float) -> Tensor:
        """Returns the sums over this process's samples of the unweighted :data:`PARTS`, on the device: reading them waits for
        it."""
        all_t, all_weights = self._sample_timesteps(step)
        t, weights = self._own(all_t), self._own(all_weights)
        set_lr(self.optimizer, lr)
        batch = batch.to(self.accelerator.device)
        sums = torch.zeros(len(PARTS), device=self.accelerator.device)
        losses = []
        for start in range(0, len(self.share), self.micro_batch_size):
            stop = min(start + self.micro_batch_size, len(self.share))
            # DDP exchanges gradients in the backward of the last micro-batch only.
            exchange = contextlib.nullcontext() if stop == len(self.share) else self.accelerator.no_sync(self.model)
            with exchange:
                per_sample, parts = self._losses(batch.slice(start, stop), t[start:stop])
                self.accelerator.backward((weights[start:stop] * per_sample).sum() / len(self.share))
            losses.append(per_sample.detach())
            sums += parts.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        if self.timestep_sampler.learns:
            self._learn(all_t, torch.cat(losses))
        return sums

    def _sample_timesteps(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and importance weights of the global batch, the same in every process."""
        return self.timestep_sampler.sample(
            uniforms(self.seed, Purpose.TIMESTEP, [0], step, (self.global_batch_size,))[0].numpy()
        )

    def _own(self, values: np.ndarray) -> Tensor:
        """This process's part of what belongs to the global batch, on the device."""
        return torch.from_numpy(values[self.share.start : self.share.stop]).to(self.accelerator.device)

    def _losses(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every sample (b,), summed over its passes, and the sums of PARTS.

        Both passes go through the network together: its first b inputs are the unmasked, the other b the masked ones.
        """
        passes, b = batch.y.shape
        model_kwargs = {"y": batch.y.flatten()}
        if batch.kept:
            model_kwargs["kept"] = batch.kept
        losses = self.diffusion.training_losses(
            self.model,
            batch.x0.repeat(passes, 1, 1, 1),
            t=t.repeat(passes),
            model_kwargs=model_kwargs,
            noise=batch.noise.flatten(0, 1),
        )
        by_pass = losses["loss"].view(passes, b)
        none = by_pass.new_zeros(1)
        mse, vb, masked = losses.get("mse", none), losses.get("vb", none), by_pass[1] if passes == 2 else none
        return by_pass.sum(0), torch.stack([part.sum() for part in (by_pass, mse, vb, by_pass[0], masked)])

    def _learn(self, timesteps: np.ndarray, losses: Tensor) -> None:
        """Show the timestep sampler the global batch's timesteps and losses, in its order, in every process."""
        gathered = self.accelerator.gather(losses.float()).cpu().double().numpy()
        self.timestep_sampler.update(timesteps, gathered)
