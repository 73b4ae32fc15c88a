"""A job of the page: two settings and what to show -> frames of both, while they are made."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.codec import Codec
from models.registry import resolve_amm
from page.library import Library
from page.settings import Limits, Pictures, Side, flags
from page.turns import in_turns
from sampling.alike import require_common
from sampling.generate import Guidance, evenly_spread, generate
from sampling.guidance_options import read_guidance
from sampling.samplers import Sampler, SwitchingSampler
from sampling.solver_options import build_sampler


@dataclass(frozen=True)
class Frame:
    """One side at one step.

    images: (N, H, W, 3) uint8, the prediction of the finished pictures; of the last step, these. seconds: of the steps so far,
    without decoding. evaluations, gmac: of an image so far; guidance by the null label evaluates twice. switches: of models in
    turn, the mean step after which an image went on to each next one, NaN where none did.
    """

    step: int
    num_steps: int
    images: np.ndarray
    seconds: float
    evaluations: float
    gmac: float
    done: bool = False
    switches: tuple[float, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What :func:`sampling.generate.generate` takes for one side."""

    model: nn.Module
    sampler: Sampler
    codec: Codec
    guidance: Guidance


def recipe(library: Library, side: Side, limits: Limits) -> Recipe:
    """Raises ValueError for settings that do not fit one another or the checkpoint."""
    index = side.model or 0
    checkpoint = library.checkpoints[index]
    args = flags(library.args, side, checkpoint, limits)
    sampler, guide = build_sampler(args, checkpoint), None
    if side.cfg_scale != 1 and side.guide is not None:
        guide = _guide(library, side)
    guidance = read_guidance(args, checkpoint.objective, guide)
    if side.model is not None:
        published = {"on": True, "off": False}
        name, size = library.args.model or checkpoint.model, checkpoint.config.input_size
        amm = resolve_amm(name, published.get(side.amm, side.amm), side.cfg_scale, size)
        return Recipe(library.network(index, amm), sampler, library.codecs[index], guidance)
    if not library.can_take_turns():
        raise ValueError("these checkpoints cannot take turns: they need one size and one transport")
    network = library.stepwise(side.ratios, side.first_several_num)
    return Recipe(network, SwitchingSampler(sampler, network), library.codecs[index], guidance)


def _guide(library: Library, side: Side) -> nn.Module:
    if side.model is None:
        raise ValueError("models that take turns are guided by the null label alone: choose no weaker checkpoint")
    if side.model == side.guide and side.amm == "off":
        raise ValueError("a checkpoint that guides itself changes nothing: choose a weaker one")
    require_common(library.checkpoints[side.model], library.checkpoints[side.guide], "a model and its guide")
    return library.network(side.guide)


@dataclass
class _Watched:
    """A sampler that tells of each step: after(k, out)."""

    inner: Sampler
    after: Callable[[int, dict[str, Tensor]], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        for k, out in enumerate(self.inner(model, noise, y, step_noise), start=1):
            self.after(k, out)
            yield out


class _Meter:
    """Seconds and work of one side, while it is on."""

    def __init__(self, library: Library, num_images: int):
        self.library, self.num_images = library, num_images
        self.seconds = self.evaluations = self.gmac = 0.0
        self.start()

    def start(self) -> None:
        work = self.library.work
        self._since = time.perf_counter(), work.evaluations, work.gmac

    def stop(self) -> None:
        if self.library.device.type == "cuda":
            torch.cuda.synchronize(self.library.device)
        work, (seconds, evaluations, gmac) = self.library.work, self._since
        self.seconds += time.perf_counter() - seconds
        self.evaluations += (work.evaluations - evaluations) / self.num_images
        self.gmac += (work.gmac - gmac) / self.num_images

    def read(self) -> dict[str, float]:
        return {"seconds": self.seconds, "evaluations": self.evaluations, "gmac": self.gmac}


def frames(library: Library, made: Recipe, pictures: Pictures, num_frames: int) -> Iterator[Frame | None]:
    """One side's: after each step its frame, or None where the step is not shown. The images are those of
    ``generate(range(N), seed=...)`` in one batch."""
    labels = pictures.of_each
    last = made.sampler.num_steps
    shown = evenly_spread(last, num_frames)

    def work(report: Callable[[Frame | None], None]) -> None:
        meter = _Meter(library, len(labels))

        def after(k: int, out: dict[str, Tensor]) -> None:
            frame = None
            meter.stop()
            if k in shown and k < last:
                images = made.codec.decode(out["pred_xstart"]).cpu().numpy()
                frame = Frame(k, last, images, **meter.read())
            report(frame)
            meter.start()

        [batch] = generate(
            made.model,
            _Watched(made.sampler, after),
            made.codec,
            range(len(labels)),
            labels=labels.__getitem__,
            seed=pictures.seed,
            guidance=made.guidance,
            batch_size=len(labels),
        )
        switched = batch.records.get("switch_steps")
        switches = () if switched is None else tuple(_mean_of_switched(column) for column in switched.T)
        report(Frame(last, last, batch.images.numpy(), **meter.read(), done=True, switches=switches))

    return in_turns(work)


def _mean_of_switched(steps: Tensor) -> float:
    return steps[steps >= 0].double().mean().item()


def run(
    library: Library,
    sides: tuple[Side, ...],
    pictures: Pictures,
    limits: Limits,
    num_frames: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[Frame | None]]:
    """Both sides' newest frames whenever there is a new one, the sides in turn; the last list holds the finished ones.

    stopped: asked after every step; True ends the job where it is. Raises ValueError for settings that cannot be, before
    anything is made, and TimeoutError after ``limits.seconds``.
    """
    pictures.check(limits, library.num_classes)
    recipes = [recipe(library, side, limits) for side in sides]
    newest: list[Frame | None] = [None] * len(sides)
    deadline = time.monotonic() + limits.seconds
    with contextlib.ExitStack() as stack:
        running = {
            number: stack.enter_context(contextlib.closing(frames(library, made, pictures, num_frames)))
            for number, made in enumerate(recipes)
        }
        while running:
            for number, steps in list(running.items()):
                for frame in steps:
                    if stopped():
                        return
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"stopped after {limits.seconds:g} seconds (--max-seconds)")
                    if frame is not None:
                        newest[number] = frame
                        yield list(newest)
                        break
                if newest[number] is not None and newest[number].done:
                    del running[number]
