"""The loop around the training step: schedule, logs, checkpoints, evaluations, sample grids, and when to leave it."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from diffusion import GaussianDiffusion
from runtime.distributed import SharedError
from runtime.stopping import StopRequest
from training.autobatch import release
from training.checkpoint import checkpoint_files, set_newer_aside
from training.data import Batches
from training.logging import RunLog
from training.optim import linear_lr
from training.placement import Replicated, Sharded
from training.profiles import Profiles
from training.sharding import local
from training.step import PARTS, Outcome, TrainingStep

DRAWS_OF_LOSS = 10  # loss.png is redrawn at every tenth log line


# (average, whether to leave) -> metrics and what they depend on besides, None if left: training.evaluation.Evaluation
Evaluate = Callable[[nn.Module, Callable[[], bool]], tuple[dict[str, float], dict[str, float | str]] | None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Numbers of steps; 0 for sample_every and eval_every: never."""

    max_steps: int
    log_every: int
    ckpt_every: int
    sample_every: int
    eval_every: int
    ema_profile_every: int
    keep_checkpoints: int  # 0 keeps all
    max_skipped_steps: int  # in a row
    init_lr: float
    final_lr: float
    lr_decay_steps: int  # 0: the learning rate is constant


class Run:
    """A training run in its results folder: where it stands, and how that is saved.

    step: steps done. skipped, skipped_in_a_row: those of them that changed nothing. facts: entries every checkpoint carries
    unchanged (args, config, data). sample: draws a grid of samples of (average, folder, step); only the main process has one,
    and only it has profiles. evaluate: measures samples of an average; all processes have one, or none.
    """

    def __init__(
        self,
        placement: Replicated | Sharded,
        train_step: TrainingStep,
        batches: Batches,
        schedule: Schedule,
        folder: Path,
        facts: dict,
        sample: Callable[[nn.Module, Path, int], None] | None = None,
        evaluate: Evaluate | None = None,
        profiles: Profiles | None = None,
    ):
        self.placement, self.train_step, self.batches, self.schedule = placement, train_step, batches, schedule
        self.folder, self.facts, self.evaluate, self.profiles = folder, facts, evaluate, profiles
        self.accelerator, self.sample = train_step.accelerator, sample
        self.step = self.skipped = self.skipped_in_a_row = 0
        # The parts of the loss, summed over this process's samples since the last log line, and the steps that went into them.
        self.sums = torch.zeros(len(PARTS), device=self.accelerator.device)
        self.summed_steps = 0

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint's content. Model and EMA weights are expected to be loaded already."""
        optimizer = self.train_step.optimizer
        # foreach and fused are choices by device; the weight decay may have been changed, with --allow-changed.
        names = ("foreach", "fused", "weight_decay")
        here = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
        groups = [{**held, **values} for held, values in zip(state["opt"]["param_groups"], here, strict=True)]
        optimizer.load_state_dict({**state["opt"], "param_groups": groups})
        self.train_step.timestep_sampler.load_state_dict(state["sampler"])
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.summed_steps = state["step"], state["summed_steps"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.accelerator.is_main_process:  # the checkpoint holds the sum over all processes
            self.sums += state["sums"].to(self.sums)
            for path in set_newer_aside(self.folder, self.step):
                print(f"going on from step {self.step}: {path} is set aside")

    def train(self, stop: StopRequest) -> None:
        """Go on to ``max_steps``, or until any process is asked to stop: then the step is finished and saved.

        Raises ValueError when too many steps in a row had to be skipped, or weights are not finite; the newest checkpoint is
        then from before that.
        """
        with contextlib.closing(RunLog(self.accelerator, self.folder, self.step, self.schedule.max_steps)) as log:
            self._train(stop, log)

    def _train(self, stop: StopRequest, log: RunLog) -> None:
        schedule = self.schedule
        if self._evaluation_is_missing(log) and not self._evaluate(stop, log):
            self._say_how_to_go_on(log, stop.reason or "another process")
            return
        for step, batch in self.batches.ahead(self.step, schedule.max_steps, self.accelerator.device):
            lr = linear_lr(step, schedule.init_lr, schedule.final_lr, schedule.lr_decay_steps)
            outcome = self.train_step(step, batch, lr, leave=lambda: stop.reason is not None)
            self.step = step + 1
            if self.profiles:
                self.profiles.update(self.step)
            self._count(outcome, log)
            is_last = self.step == schedule.max_steps
            if is_last or self.step % schedule.log_every == 0:
                log.write(self.step, {**self._means(), "lr": lr, "skipped_steps": self.skipped})
                self.sums, self.summed_steps = torch.zeros_like(self.sums), 0
                if is_last or self.step % (schedule.log_every * DRAWS_OF_LOSS) == 0:
                    log.draw()
            if self.profiles and (is_last or self.step % schedule.ema_profile_every == 0):
                self.profiles.save(self.folder, self.step, self.facts["config"])
            # Not amid skipped steps: the newest checkpoint stays the last one from before them.
            saves = is_last or outcome.leave or (self.step % schedule.ckpt_every == 0 and not self.skipped_in_a_row)
            if saves:
                self._save()
            evaluates = self._evaluation_is_due()
            leaves = outcome.leave or (evaluates and not self._evaluate(stop, log))
            if leaves and not saves:
                self._save()
            if self.sample and schedule.sample_every and self.step % schedule.sample_every == 0:
                self.sample(self.train_step.ema.model, self.folder, self.step)
            if leaves and (evaluates or not is_last):
                self._say_how_to_go_on(log, stop.reason or "another process")
                break
        else:
            log.message(f"done: {self.step} steps, {self.folder}")

    def _evaluation_is_due(self) -> bool:
        """After the last step always, so that a run ends with one."""
        every = self.schedule.eval_every
        return bool(self.evaluate and self.step) and (self.step % every == 0 or self.step == self.schedule.max_steps)

    def _evaluation_is_missing(self, log: RunLog) -> bool:
        """Whether a run that goes on was left before the evaluation of its step was done."""
        return self._evaluation_is_due() and not broadcast_object_list([log.has_evaluation(self.step)])[0]

    def _evaluate(self, stop: StopRequest, log: RunLog) -> bool:
        """Whether it was not left for a request to stop. One that fails is told of, and the training goes on: it is as good as
        before."""
        with log.paused():
            began, found, failure = time.perf_counter(), None, None
            try:
                found = self.evaluate(self.train_step.ema.model, lambda: stop.reason is not None)
            except (ValueError, OSError) as error:
                failure = str(error)
            if failure is not None:
                log.message(f"step {self.step:7d}  not evaluated: {failure}")
                release(self.accelerator.device)  # the error held on to all that filled the memory
            elif found is not None:
                log.evaluated(self.step, *found, time.perf_counter() - began)
        return failure is not None or found is not None

    def _count(self, outcome: Outcome, log: RunLog) -> None:
        log.step_done(self.train_step.global_batch_size)
        if outcome.fault is None:
            self.sums += outcome.sums
            self.summed_steps, self.skipped_in_a_row = self.summed_steps + 1, 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        log.message(f"step {self.step:7d}  skipped: {outcome.fault} ({self.skipped_in_a_row} in a row, {self.skipped} in all)")
        if self.skipped_in_a_row >= self.schedule.max_skipped_steps:
            self._stop(f"{outcome.fault} in step {self.step}, the last of {self.skipped_in_a_row} skipped in a row")

    def _say_how_to_go_on(self, log: RunLog, reason: str) -> None:
        log.message(
            f"stopped by {reason} after step {self.step}, all is saved: go on with the same command and "
            f"--resume {self.folder} (or --resume auto)"
        )

    def _means(self) -> dict[str, float]:
        """The parts of the loss per sample since the last log line, over all processes."""
        sums = self._global_sums()
        samples = self.summed_steps * self.train_step.global_batch_size
        absent = set() if len(self.batches.passes) == 2 else {"loss_masked"}
        if not isinstance(self.train_step.diffusion, GaussianDiffusion):
            absent |= {"mse", "vb"}
        if not samples:
            return {}
        return {name: total / samples for name, total in zip(PARTS, sums.tolist(), strict=True) if name not in absent}

    def _global_sums(self) -> Tensor:
        return self.accelerator.reduce(self.sums, reduction="sum")

    def _stop(self, reason: str) -> None:
        good = checkpoint_files(self.folder)
        if good:
            reason += f"; the last good checkpoint is {good[0]}: start again with --init-from it and"
        else:
            reason += "; there is no checkpoint yet: start again with"
        raise SharedError(f"{reason} a lower --init-lr, a --grad-clip, or --precision fp32")

    def _save(self) -> None:
        """Only a state whose weights are all finite is written."""
        sums = self._global_sums()
        parts = local(self.train_step.model.parameters())
        [broken] = self.train_step.any_process(~torch.stack([part.isfinite().all() for part in parts]).all())
        if broken:
            self._stop(f"the weights are not finite after step {self.step}")
        scaler = self.accelerator.scaler
        profiles = {"profiles": self.profiles.state_dict()} if self.profiles else {}
        state = {
            "model": self.placement.network.state_dict(),
            "ema": self.placement.ema.state_dict(),
            "opt": self.train_step.optimizer.state_dict(),
            "sampler": self.train_step.timestep_sampler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "sums": sums.cpu(),
            "summed_steps": self.summed_steps,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "step": self.step,
            **profiles,
            **self.facts,
        }
        self.placement.save(state, self.folder, self.step, self.schedule.keep_checkpoints)
