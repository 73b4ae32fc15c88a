"""One optimizer step on the global batch: the piece that every training script shares."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion import GaussianDiffusion
from diffusion.timesteps import ContinuousSampler, UniformSampler
from diffusion.transport import Transport
from runtime.draws import Purpose, uniforms
from training.data import Batch, to_device
from training.ema import EMA
from training.optim import set_lr
from training.sharding import ShardedEMA, whole

# mse and vb: of Gaussian diffusion only. grad_norm: of the whole gradient, before it is clipped.
PARTS = ("loss", "mse", "vb", "loss_plain", "loss_masked", "grad_norm")


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    sums: over this process's samples, of the unweighted :data:`PARTS`, on the device. fault: why weights, EMA and timestep
    sampler were left as they were; None for a step that was made. leave: whether any process asks to stop. fault and leave are
    the same in every process.
    """

    sums: Tensor
    fault: str | None
    leave: bool


@dataclass
class TrainingStep:
    """Draw timesteps, predict, go back, update weights, EMA and the timestep sampler; unless loss or gradient is not finite.

    model and optimizer: of :mod:`training.placement`. share: this process's positions in the global batch. micro_batch_size:
    samples that go through the network at once (each twice with a masked pass); the gradient is that of the whole batch.
    grad_clip: the largest norm of the gradient, a longer one is shortened to it; 0: none is.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | ShardedEMA
    diffusion: GaussianDiffusion | Transport
    timestep_sampler: UniformSampler | ContinuousSampler
    seed: int
    global_batch_size: int
    share: Sequence[int]
    micro_batch_size: int
    grad_clip: float = 0.0

    def __call__(self, step: int, batch: Batch, lr: float, leave: Callable[[], bool] = lambda: False) -> Outcome:
        """leave: whether this process asks to stop after the step; asked when the step's work is done."""
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
        norm = self._gradient_norm()
        sums[-1] = norm * len(self.share)  # as if every sample had it: their mean is the norm
        flags, all_losses = self._exchange([~norm.isfinite(), ~sums[:-1].isfinite().all(), leave()], losses)
        wrong_gradient, wrong_loss, leaving = flags.T
        fault = _fault(wrong_gradient, wrong_loss)
        if fault is None:
            self._update(all_t, all_losses)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # fp16: lowers the loss scale where it was too high
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(sums, fault, bool(leaving.any()))

    def _gradient_norm(self) -> Tensor:
        """Of the gradient of the global batch, which every process holds; it is clipped to ``grad_clip``."""
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm(parameter.grad for parameter in parameters))
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        return norm

    def _exchange(self, flags: Sequence[Tensor | bool], losses: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Each process's flags, (processes, F), and the global batch's losses, in its order, which are empty for a timestep
        sampler that does not learn. The step's one exchange besides the gradient's, and the one time that it waits for the
        device (in fp16 the loss scaler does so too): whether the weights may change is decided here."""
        device = self.accelerator.device
        mine = [_on(device, flag).reshape(1) for flag in flags]
        mine += [part.float() for part in losses] if self.timestep_sampler.learns else []
        gathered = self.accelerator.gather(torch.cat(mine)).view(self.accelerator.num_processes, -1).cpu().double().numpy()
        return gathered[:, : len(flags)] > 0, gathered[:, len(flags) :].flatten()

    def any_process(self, *flags: Tensor | bool) -> list[bool]:
        """Whether any process raises each flag. Waits for the device."""
        device = self.accelerator.device
        votes = torch.stack([_on(device, flag) for flag in flags])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        return [vote > 0 for vote in votes.tolist()]

    def _update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        self.optimizer.step()
        self.ema.update()
        if self.timestep_sampler.learns:
            self.timestep_sampler.update(timesteps, losses)

    def _sample_timesteps(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and importance weights of the global batch, the same in every process."""
        return self.timestep_sampler.sample(
            uniforms(self.seed, Purpose.TIMESTEP, [0], step, (self.global_batch_size,))[0].numpy()
        )

    def _own(self, values: np.ndarray) -> Tensor:
        """This process's part of what belongs to the global batch, on the device."""
        return to_device(torch.from_numpy(values[self.share.start : self.share.stop]), self.accelerator.device)

    def _losses(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every sample (b,), summed over its passes, and the sums of PARTS, 0 for grad_norm.

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
        return by_pass.sum(0), torch.stack([part.sum() for part in (by_pass, mse, vb, by_pass[0], masked, none)])


def _on(device: torch.device, flag: Tensor | bool) -> Tensor:
    """A flag as a float on the device, without waiting for it."""
    return flag.float() if isinstance(flag, Tensor) else torch.full((), float(flag), device=device)


def _fault(wrong_gradient: np.ndarray, wrong_loss: np.ndarray) -> str | None:
    """Why a step is not made; by process, whether its gradient and its loss are not finite."""
    if wrong_loss.any():
        processes = np.flatnonzero(wrong_loss)
        return f"the loss is not finite on process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
    return "the gradient is not finite" if wrong_gradient.any() else None
