"""What a network is given to look into it: images, real or freshly sampled, at one noise level."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.codec import Codec
from data.images import ImageFolder, load_image
from data.npz import npz_keys, npz_shape, read_array, read_batches
from diffusion import create_diffusion
from diffusion.transport import create_transport
from models.checkpoints import Checkpoint
from runtime.cli import ArgumentParser, non_negative_float, number, positive_int, probability, seed
from runtime.draws import Purpose, normals
from sampling.generate import Guidance, generate, label_source
from sampling.guidance_options import published_power
from sampling.preview import quick_sampler
from sampling.samplers import transport_settings
from sampling.solver_options import refuse

NUM_STEPS = 50  # of fresh images
OF_FRESH_IMAGES = ("num_sampling_steps", "cfg_scale", "labels")


@dataclass(frozen=True)
class Probe:
    """images (B, H, W, 3) uint8, and as latents (B, C, S, S). labels (B,): the null class of images without one."""

    images: np.ndarray
    latents: Tensor
    labels: Tensor


def add_probe_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what the network is given")
    group.add_argument("--data", type=Path, help="images: a folder with one folder a class, or an .npz (default: sampled anew)")
    group.add_argument("--num-images", type=positive_int, default=8, help="how many, evenly spread over the data")
    group.add_argument("--level", type=probability, default=0.5, help="noise level: 1 is pure noise, 0 data")
    group.add_argument("--labels", help="of fresh images: random, balanced (the default), or a file with one label an image")
    group.add_argument("--num-sampling-steps", type=number(int, 2, 1000), help=f"of fresh images (default: {NUM_STEPS})")
    group.add_argument("--cfg-scale", type=non_negative_float, help="of fresh images: guidance (default: 1, none)")
    group.add_argument("--seed", type=seed, default=0, help="of noise and fresh images")


def make_probe(args: Namespace, checkpoint: Checkpoint, model: nn.Module, codec: Codec) -> Probe:
    """By the flags of :func:`add_probe_arguments`. model: on the codec's device, in eval mode; fresh images are its own. Raises
    ValueError for data or labels that do not fit it."""
    if args.data is None:
        return _fresh(args, checkpoint, model, codec)
    refuse(args, OF_FRESH_IMAGES, "images of --data")
    config = checkpoint.config
    size, null = config.input_size * codec.downsample, config.num_classes
    images, labels = _read(args.data, size, args.num_images)
    labels = np.full(len(images), null) if labels is None else _checked(labels, null, f"--data {args.data}", checkpoint.path)
    noise = _noise(args.seed, codec.latent_shape(size), range(len(images)), 2) if codec.stochastic else None
    with torch.inference_mode():
        latents = codec.encode(torch.from_numpy(images), noise)
    return Probe(images, latents, torch.from_numpy(labels).to(latents.device))


def noised(checkpoint: Checkpoint, probe: Probe, level: float, seed: int) -> tuple[Tensor, Tensor]:
    """The network's x (B, C, S, S) and t (B,) at a noise level, as it was trained: t/1000 of Gaussian diffusion, 1 - t of a
    transport."""
    latents = probe.latents
    noise = _noise(seed, latents.shape[1:], range(len(latents)), 1).to(latents)
    if checkpoint.objective["name"] == "gaussian":
        diffusion = create_diffusion()
        t = torch.full((len(latents),), min(round(1000 * level), diffusion.num_timesteps - 1), device=latents.device)
        return diffusion.q_sample(latents, t, noise), t
    transport = create_transport(**transport_settings(checkpoint.objective))
    t = torch.full((len(latents),), 1 - level, device=latents.device)
    return transport.interpolate(t, latents, noise)[0], t


def _noise(seed: int, shape: tuple[int, ...], ids: range, step: int) -> Tensor:
    """Step 0 began fresh images; their samplers draw no other."""
    return normals(seed, Purpose.SAMPLE_NOISE, ids, step, tuple(shape))


class _Latents:
    """In the place of a codec: latents as they are."""

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        return latents


def _fresh(args: Namespace, checkpoint: Checkpoint, model: nn.Module, codec: Codec) -> Probe:
    sampler = quick_sampler(checkpoint.objective, args.num_sampling_steps or NUM_STEPS)
    labels = label_source(args.labels or "balanced", checkpoint.config.num_classes, args.seed, args.num_images)
    scale = 1.0 if args.cfg_scale is None else args.cfg_scale
    guidance = Guidance(scale, power=published_power(checkpoint.objective))
    ids = range(args.num_images)
    batches = list(generate(model, sampler, _Latents, ids, labels=labels, seed=args.seed, guidance=guidance))
    latents, y = (torch.cat([getattr(batch, name) for batch in batches]).to(codec.device) for name in ("images", "labels"))
    with torch.inference_mode():
        images = codec.decode(latents).cpu().numpy()
    return Probe(images, latents, y)


def _read(path: Path, size: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 (count, size, size, 3), evenly spread over what is there, and labels where it has them."""
    if path.suffix != ".npz":
        folder = ImageFolder(path)
        rows = _spread(len(folder), count, path)
        return np.stack([load_image(folder.paths[row], size) for row in rows]), folder.labels[rows]
    shape, dtype = npz_shape(path, "arr_0")
    if dtype != np.uint8 or shape[1:] != (size, size, 3):
        raise ValueError(f"--data {path}: arr_0 is {dtype} {shape}; the checkpoint takes uint8 images (N, {size}, {size}, 3)")
    rows = _spread(shape[0], count, path)
    [images] = read_batches(path, "arr_0", len(rows), rows.tolist())
    if "arr_1" not in npz_keys(path):
        return images, None
    labels = read_array(path, "arr_1")
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"--data {path}: arr_1 is {labels.dtype} {labels.shape}, not one label for each of {shape[0]} images")
    return images, labels[rows].astype(np.int64)


def _checked(labels: np.ndarray, num_classes: int, data: str, path: Path) -> np.ndarray:
    """Raises ValueError for a label that the model does not have; num_classes itself is its word for none."""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"{data}: label {outside[0]}, but {path} has classes 0 to {num_classes - 1}")
    return labels


def _spread(available: int, count: int, path: Path) -> np.ndarray:
    if count > available:
        raise ValueError(f"--data {path} holds {available} images, fewer than --num-images {count}")
    return np.arange(count) * available // count
