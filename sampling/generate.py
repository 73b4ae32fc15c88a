"""The one sampling iterator: PNGs, npz, grids and metrics all take their images from it.

Label, initial noise and every later noise of image i are functions of (seed, i). Image i is therefore the same for any batch
size, any number of processes and any number of restarts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.guidance import Autoguidance, ClassifierFreeGuidance, Guided
from runtime.ahead import CallAhead, read_ahead
from runtime.draws import Purpose, normals, uniforms
from sampling.samplers import Sampler, StepNoise

LabelOf = Callable[[int], int]
LABEL_RULES = ("random", "balanced")


@dataclass
class Batch:
    """Finished images of one network batch.

    previews: decoded x_0 predictions of some steps, where asked for. records: what the sampler tells about each sample beside
    it, by name, each (B, ...) on the CPU. copied: the end of the copies from the device; None: they are at their end.
    """

    image_ids: list[int]
    labels: Tensor  # (B,) int64
    images: Tensor  # (B, H, W, 3) uint8, on the CPU
    previews: list[Tensor]  # each like images
    records: dict[str, Tensor]
    copied: torch.cuda.Event | None = None

    def wait(self) -> "Batch":
        """This batch, once its tensors have arrived on the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return self


@dataclass(frozen=True)
class Guidance:
    """What :mod:`diffusion.guidance` does with a network.

    channels: how many of the first latent channels are guided, None for all. interval: the noise levels that are guided, None
    for all. power: of the power-cosine by which guidance grows as the noise falls; 0: the same at all levels, None: as the
    network was published. guide: a weaker network to guide with (autoguidance), on the model's device and in eval mode; None:
    classifier-free guidance.
    """

    scale: float = 1.0
    channels: int | None = 3
    interval: tuple[float, float] | None = None
    power: float | None = None
    guide: nn.Module | None = None

    def around(self, model: nn.Module) -> Guided:
        """The model under this guidance. Raises ValueError for a scale, interval or power that is none."""
        if self.guide is not None:
            return Autoguidance(model, self.guide, self.scale, self.channels, self.interval, self.power or 0.0)
        null_label = model.config.num_classes
        return ClassifierFreeGuidance(model, self.scale, null_label, self.channels, self.interval, self.power)


@torch.inference_mode()
def generate(
    model: nn.Module,
    sampler: Sampler,
    codec,
    image_ids: Sequence[int],
    *,
    labels: LabelOf,
    seed: int,
    guidance: Guidance = Guidance(),
    batch_size: int = 32,
    num_previews: int = 0,
    pad_last: bool = False,
    wait: bool = True,
    after_step: Callable[[], None] | None = None,
) -> Iterator[Batch]:
    """Yield the images ``image_ids`` in order, in batches; callers only parse and write.

    model: in eval mode, on the device to work on; its config gives the latents' shape and the null label. codec: decodes
    latents. labels: the label of image i. num_previews: decode the x_0 prediction of so many evenly spread steps, the last
    included. pad_last: fill the last batch up with copies of its last image, which are then dropped, so that a compiled network
    meets one shape only; where the sampler's steps depend on the whole batch, or no such shape is met, it stays. wait: False
    yields a batch before its tensors have arrived, so that the device goes on with the next one: call :meth:`Batch.wait`.
    after_step: called after each step that the sampler yields; what it raises ends the sampling.
    """
    config, device = model.config, next(model.parameters()).device
    shape = (config.in_channels, config.input_size, config.input_size)
    draws = _Draws(seed, shape, labels, device, batch_size if pad_last and sampler.may_be_filled else None)
    guided = guidance.around(model)
    previewed = evenly_spread(sampler.num_steps, num_previews)
    cut = [list(image_ids[start : start + batch_size]) for start in range(0, len(image_ids), batch_size)]
    with contextlib.closing(draws.starts(cut)) as starts:
        for ids, y, noise in starts:
            previews = []
            with draws.of_steps(ids, sampler.num_solver_steps) as step_noise:
                for k, out in enumerate(sampler(guided, draws.moved(noise), draws.moved(y), step_noise), start=1):
                    if k in previewed:
                        previews.append(out["pred_xstart"])
                    if after_step:
                        after_step()
            batch = _finish(codec, ids, y, out, previews)
            yield batch.wait() if wait else batch


def evenly_spread(num_steps: int, count: int) -> set[int]:
    """``count`` of the steps 1, ..., num_steps, the last among them."""
    return set(np.linspace(num_steps, 1, count).round().astype(int).tolist())


class _Draws:
    """What is drawn for a job: labels, initial noise and step noise, functions of (seed, image, step) alone.

    Of an accelerator a thread draws one thing ahead, into pinned memory, and copies wait for nothing. A CPU draws in the time
    of the network, whichever thread does it. full: the size to which batches are filled up; None: they are not.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], labels: LabelOf, device: torch.device, full: int | None):
        self.seed, self.shape, self.labels, self.device, self.full = seed, shape, labels, device, full
        self.ahead = device.type != "cpu"

    def starts(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """The images, labels and initial noise of each batch; the latter two may be filled up."""
        drawn = (self._start(ids) for ids in batches)
        return read_ahead(drawn) if self.ahead else drawn

    def _start(self, ids: list[int]) -> tuple[list[int], Tensor, Tensor]:
        filled = self._filled(ids)
        return ids, self._pinned(torch.tensor([int(self.labels(i)) for i in filled])), self._noise(filled, 0)

    @contextlib.contextmanager
    def of_steps(self, ids: list[int], num_steps: int) -> Iterator[StepNoise]:
        """The noise of step k = 1, 2, ..., num_steps of a batch, on the device."""
        filled = self._filled(ids)
        if not self.ahead:
            yield lambda k: self._noise(filled, k)
            return
        with CallAhead(lambda k: self._noise(filled, k), num_steps) as drawn:
            yield lambda k: self.moved(drawn(k))

    def _filled(self, ids: list[int]) -> list[int]:
        return ids + ids[-1:] * ((self.full or 0) - len(ids))

    def _noise(self, ids: list[int], k: int) -> Tensor:
        return self._pinned(normals(self.seed, Purpose.SAMPLE_NOISE, ids, k, self.shape))

    def _pinned(self, drawn: Tensor) -> Tensor:
        return drawn.pin_memory() if self.device.type == "cuda" else drawn

    def moved(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device, non_blocking=self.device.type == "cuda")


def _finish(codec, ids: list[int], y: Tensor, out: dict[str, Tensor], previews: list[Tensor]) -> Batch:
    """Decode, and begin to copy the images to the CPU."""
    count = len(ids)

    def to_host(value: Tensor) -> Tensor:
        return value[:count].to("cpu", non_blocking=value.is_cuda)  # from CUDA into pinned memory

    decoded = [to_host(codec.decode(preview[:count])) for preview in previews]
    records = {name: to_host(value) for name, value in out.items() if name not in ("sample", "pred_xstart")}
    images = to_host(codec.decode(out["sample"][:count]))
    copied = None
    if out["sample"].is_cuda:
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(out["sample"].device))
    return Batch(ids, y[:count], images, decoded, records, copied)


def label_source(spec: str, num_classes: int, seed: int, num_images: int) -> LabelOf:
    """The label of image i, as ``--labels`` says.

    random: uniform, a function of (seed, i), as published. balanced: i mod num_classes. Otherwise a text file with one label a
    line, or a .npy file, at least ``num_images`` long. Raises ValueError for a file that cannot be used.
    """
    if spec == "random":
        return lambda i: int(uniforms(seed, Purpose.SAMPLE_LABEL, [i]).double().item() * num_classes)
    if spec == "balanced":
        return lambda i: i % num_classes
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"--labels {spec}: neither random, balanced, nor a file")
    try:
        listed = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
        listed = listed.astype(np.int64, casting="safe")
    except Exception as error:  # of a damaged file, anything from TokenError to a MemoryError for what it claims
        raise ValueError(f"--labels {spec}: not a list of whole numbers ({error})") from None
    if listed.ndim != 1 or len(listed) < num_images:
        raise ValueError(f"--labels {spec}: holds {listed.shape} labels, {num_images} are needed")
    outside = listed[(listed < 0) | (listed >= num_classes)]
    if len(outside):
        raise ValueError(f"--labels {spec}: label {outside[0]} is not below the model's {num_classes} classes")
    return lambda i: int(listed[i])
