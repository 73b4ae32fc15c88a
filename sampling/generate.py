"""The one sampling iterator: PNGs, npz, grids and metrics all take their images from it.

Label, initial noise and every later noise of image i are functions of (seed, i). Image i is therefore the same for any batch
size, any number of processes and any number of restarts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.guidance import ClassifierFreeGuidance
from runtime.draws import Purpose, normals, uniforms
from sampling.samplers import Sampler

LabelOf = Callable[[int], int]
LABEL_RULES = ("random", "balanced")


@dataclass
class Batch:
    """Finished images of one network batch.

    previews: decoded x_0 predictions of some steps, where asked for. records: what the sampler tells about each sample beside
    it, by name, each (B, ...) on the CPU.
    """

    image_ids: list[int]
    labels: Tensor  # (B,) int64
    images: Tensor  # (B, H, W, 3) uint8, on the CPU
    previews: list[Tensor]  # each like images
    records: dict[str, Tensor]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance; channels: how many of the first latent channels are guided, None for all."""

    scale: float = 1.0
    channels: int | None = 3


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
    autocast_dtype: torch.dtype | None = None,
    num_previews: int = 0,
) -> Iterator[Batch]:
    """Yield the images ``image_ids`` in order, in batches; callers only parse and write.

    model: in eval mode, on the device to work on; its config gives the latents' shape and the null label. codec: decodes
    latents. labels: the label of image i. num_previews: decode the x_0 prediction of so many evenly spread steps, the last
    included.
    """
    config, device = model.config, next(model.parameters()).device
    shape = (config.in_channels, config.input_size, config.input_size)
    guided = ClassifierFreeGuidance(model, guidance.scale, config.num_classes, guidance.channels)
    previewed = set(np.linspace(1, sampler.num_steps, num_previews).round().astype(int).tolist()) if num_previews else set()
    for start in range(0, len(image_ids), batch_size):
        ids = list(image_ids[start : start + batch_size])
        y = torch.tensor([int(labels(i)) for i in ids])
        noise = normals(seed, Purpose.SAMPLE_NOISE, ids, 0, shape).to(device)

        def step_noise(k: int, ids: list[int] = ids) -> Tensor:
            return normals(seed, Purpose.SAMPLE_NOISE, ids, k, shape)

        previews = []
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            for k, out in enumerate(sampler(guided, noise, y.to(device), step_noise), start=1):
                if k in previewed:
                    previews.append(out["pred_xstart"])
        previews = [codec.decode(preview).cpu() for preview in previews]  # outside autocast, as the finished images
        records = {name: value.cpu() for name, value in out.items() if name not in ("sample", "pred_xstart")}
        yield Batch(ids, y, codec.decode(out["sample"]).cpu(), previews, records)


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
