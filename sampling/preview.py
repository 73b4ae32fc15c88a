"""Grids of samples from a model in training."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from data.codec import Codec, load_codec
from diffusion.transport import ODE, create_transport
from runtime.distributed import is_first_process
from sampling.generate import Guidance, generate
from sampling.grids import save_grid
from sampling.guidance_options import published_power
from sampling.samplers import Sampler, TransportSampler, gaussian_sampler, transport_settings

CLASSES, PER_CLASS = 10, 4


def grid_writer(args: Namespace, config: dict) -> Callable[[nn.Module, Path, int], None] | None:
    """A function (average, folder, step) that draws ``<folder>/samples/<step>.png``: rows are the first classes. None without
    ``--sample-every``, and on all processes but the first.

    args: of :mod:`training.options`. config: what the run's checkpoints say of the model. Raises ValueError for a codec that
    cannot be had or does not fit.
    """
    if not (args.sample_every and is_first_process()):
        return None
    codec = run_codec(args, config)
    sampler = quick_sampler(config["objective"], args.sample_steps)
    classes = range(min(config["model_config"]["num_classes"], CLASSES))
    labels = [label for label in classes for _ in range(PER_CLASS)]

    def write(model: nn.Module, folder: Path, step: int) -> None:
        batches = generate(
            model,
            sampler,
            codec,
            range(len(labels)),
            labels=labels.__getitem__,
            seed=args.seed,
            guidance=Guidance(args.cfg_scale, power=published_power(config["objective"])),
        )
        images = torch.cat([batch.images for batch in batches]).numpy()
        save_grid(images, folder / "samples" / f"{step:07d}.png", PER_CLASS, [str(label) for label in classes])

    return write


def run_codec(args: Namespace, config: dict) -> Codec:
    """What decodes a run's latents. Raises ValueError for a codec that cannot be had or does not fit."""
    codec = _codec(args.vae or config["codec"]["name"], PartialState().device)
    channels = config["model_config"]["in_channels"]
    if codec.latent_channels != channels:
        raise ValueError(f"--vae {codec.name} decodes latents of {codec.latent_channels} channels, the run's have {channels}")
    return codec


_codec = functools.lru_cache(maxsize=1)(load_codec)  # grids and evaluations share one


def quick_sampler(objective: dict, num_steps: int) -> Sampler:
    """For a few pictures: DDIM, or Heun's method. objective: as a checkpoint states it."""
    return sampler_for(objective, ("ddim", num_steps), ("heun", num_steps + 1))


def sampler_for(objective: dict, gaussian: tuple[str, int], ode: tuple[str, int]) -> Sampler:
    """gaussian, ode: for each mathematics a solver, and its number of steps, of an ODE of points in time."""
    if objective["name"] == "gaussian":
        return gaussian_sampler(*gaussian)
    return TransportSampler(ODE(create_transport(**transport_settings(objective)), *ode))
