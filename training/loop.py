"""The loop around the training step: schedule, logs, checkpoints, sample grids."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from training.checkpoint import checkpoint_files, save_checkpoint, set_newer_aside
from training.data import Batches
from training.logging import RunLog
from training.optim import linear_lr
from training.step import PARTS, TrainingStep

DRAWS_OF_LOSS = 10  # loss.png is redrawn at every tenth log line


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Numbers of steps; 0 for sample_every: never."""

    max_steps: int
    log_every: int
    ckpt_every: int
    sample_every: int
    keep_checkpoints: int  # 0 keeps all
    init_lr: float
    final_lr: float
    lr_decay_steps: int  # 0: the learning rate is constant


class Run:
    """A training run in its results folder: where it stands, and how that is saved.

    step: optimizer steps done. facts: entries every checkpoint carries unchanged (args, config).
    """

    def __init__(self, train_step: TrainingStep, batches: Batches, schedule: Schedule, folder: Path, facts: dict):
        self.train_step, self.batches, self.schedule, self.folder, self.facts = train_step, batches, schedule, folder, facts
        self.accelerator = train_step.accelerator
        self.step = 0
        # The parts of the loss, summed over this process's samples since the last log line, and the steps that went into them.
        self.sums = torch.zeros(len(PARTS), device=self.accelerator.device)
        self.summed_steps = 0

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint's content. Model and EMA weights are expected to be loaded already."""
        optimizer = self.train_step.optimizer
        here = [group.get("foreach") for group in optimizer.param_groups]  # a choice by device, not part of the run's state
        optimizer.load_state_dict(state["opt"])
        for group, foreach in zip(optimizer.param_groups, here, strict=True):
            if "foreach" in group:
                group["foreach"] = foreach
        self.train_step.timestep_sampler.load_state_dict(state["sampler"])
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.summed_steps = state["step"], state["summed_steps"]
        if self.accelerator.is_main_process:  # the checkpoint holds the sum over all processes
            self.sums += state["sums"].to(self.sums)
            for path in set_newer_aside(self.folder, self.step):
                print(f"going on from step {self.step}: {path} is set aside")

    def train(self, sample: Callable[[int], None] | None = None) -> None:
        """Go on to ``max_steps``. sample(step) draws a grid of samples; it is called in the main process.

        Raises ValueError when the loss is no longer finite; the newest checkpoint is then from before that.
        """
        schedule = self.schedule
        log = RunLog(self.accelerator, self.folder, self.step, schedule.max_steps)
        began, began_step = time.perf_counter(), self.step
        for step, batch in self.batches.ahead(self.step, schedule.max_steps, in_thread=self.accelerator.device.type != "cpu"):
            lr = linear_lr(step, schedule.init_lr, schedule.final_lr, schedule.lr_decay_steps)
            self.sums += self.train_step(step, batch, lr)
            self.step, self.summed_steps = step + 1, self.summed_steps + 1
            log.bar.update()
            is_last = self.step == schedule.max_steps
            if is_last or self.step % schedule.log_every == 0:
                means = self._means()  # waits for the device, so the clock is read after it
                seconds = max(time.perf_counter() - began, 1e-9)
                speed = (self.step - began_step) * self.train_step.global_batch_size / seconds
                log.write(self.step, {**means, "lr": lr}, speed)
                self.sums, self.summed_steps = torch.zeros_like(self.sums), 0
                if is_last or self.step % (schedule.log_every * DRAWS_OF_LOSS) == 0:
                    log.draw()
                began, began_step = time.perf_counter(), self.step
            if is_last or self.step % schedule.ckpt_every == 0:
                self._save()
            if sample and schedule.sample_every and self.step % schedule.sample_every == 0 and self.accelerator.is_main_process:
                sample(self.step)
        log.message(f"done: {self.step} steps, {self.folder}")
        log.close()

    def _means(self) -> dict[str, float]:
        """The parts of the loss per sample since the last log line, over all processes."""
        sums = self._global_sums()
        samples = self.summed_steps * self.train_step.global_batch_size
        absent = set() if len(self.batches.passes) == 2 else {"loss_masked"}
        if not isinstance(self.train_step.diffusion, GaussianDiffusion):
            absent |= {"mse", "vb"}
        return {name: total / samples for name, total in zip(PARTS, sums.tolist(), strict=True) if name not in absent}

    def _global_sums(self) -> Tensor:
        sums = self.accelerator.reduce(self.sums, reduction="sum")
        if not torch.isfinite(sums).all():
            self._stop(f"the loss is not finite at or before step {self.step} (seen in the last {self.summed_steps} steps)")
        return sums

    def _stop(self, reason: str) -> None:
        good = checkpoint_files(self.folder)
        raise ValueError(
            f"{reason}; the last good checkpoint is {good[0] if good else 'none'}: "
            "start again with --init-from it and a lower --init-lr, or --precision fp32"
        )

    def _save(self) -> None:
        """Only a state whose losses and weights are all finite is written."""
        sums = self._global_sums() if self.summed_steps else self.sums
        if not all(parameter.isfinite().all() for parameter in self.train_step.model.parameters()):
            self._stop(f"the weights are not finite after step {self.step}")
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "model": self.accelerator.unwrap_model(self.train_step.model).state_dict(),
            "ema": self.train_step.ema.model.state_dict(),
            "opt": self.train_step.optimizer.state_dict(),
            "sampler": self.train_step.timestep_sampler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "sums": sums.cpu(),
            "summed_steps": self.summed_steps,
            "step": self.step,
            **self.facts,
        }
        save_checkpoint(state, self.folder, self.step, self.schedule.keep_checkpoints)
