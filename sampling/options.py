"""The flags that the sampling scripts share, and what they build."""

from dataclasses import dataclass

import torch
from torch import nn

from data.codec import Codec, load_codec
from diffusion import create_diffusion
from models import model_names
from models.amm import AMM
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.layers import compile_blocks
from models.registry import resolve_amm
from runtime.cli import ArgumentParser, BooleanFlag, non_negative_float, positive_int, seed
from runtime.distributed import autocast_dtype, check_precision
from sampling.generate import GaussianSampler, Guidance

DEFAULT_CODEC = "sd-vae-ft-ema"  # of published checkpoints, which do not say


class AMMFlag(BooleanFlag):
    """A boolean that also takes a placement, as exp:7,10."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value is not None and ":" in value and not option_string.startswith("--no-"):
            setattr(namespace, self.dest, value)
        else:
            super().__call__(parser, namespace, value, option_string)


def add_sampling_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="checkpoint of training, or a published one")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of the checkpoint")
    parser.add_argument("--model", choices=model_names(), help="default: what the checkpoint holds; another one is an error")
    parser.add_argument("--amm", action=AMMFlag, help="attention modulation: True = the model's placement, or exp:7,10")
    parser.add_argument("--vae", help="decoder: a folder, hub id, sd-vae-ft-ema, -mse or pixels (default: the checkpoint's)")
    parser.add_argument("--cfg-scale", type=non_negative_float, default=1.0, help="classifier-free guidance; 1 = none")
    parser.add_argument(
        "--cfg-channels", choices=("3", "all"), default="3", help="latent channels that are guided; 3 as published"
    )
    parser.add_argument("--num-sampling-steps", type=positive_int, default=250)
    parser.add_argument("--ddim", action=BooleanFlag, help="DDIM instead of ancestral sampling")
    parser.add_argument("--seed", "--global-seed", type=seed, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--compile", action=BooleanFlag, help="torch.compile the transformer blocks")


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint ready to sample: what :func:`sampling.generate.generate` takes."""

    checkpoint: Checkpoint
    model: nn.Module
    sampler: GaussianSampler
    codec: Codec
    guidance: Guidance
    amm: AMM | None
    autocast_dtype: torch.dtype | None

    @property
    def num_classes(self) -> int:
        return self.checkpoint.config.num_classes

    @property
    def image_size(self) -> int:
        return self.checkpoint.config.input_size * self.codec.downsample


def build_pipeline(args, device: torch.device) -> Pipeline:
    """From the flags of :func:`add_sampling_arguments`. Raises ValueError for a checkpoint, codec or flag that does not fit."""
    check_precision(args.precision, device)
    checkpoint = read_checkpoint(args.ckpt, args.weights)
    amm = resolve_amm(args.model or checkpoint.model, args.amm, args.cfg_scale, checkpoint.config.input_size)
    model = build_model(checkpoint, name=args.model, amm=amm).to(device)
    codec = load_codec(args.vae or checkpoint.codec.get("name", DEFAULT_CODEC), device)
    if codec.latent_channels != checkpoint.config.in_channels:
        raise ValueError(
            f"{args.ckpt} makes latents of {checkpoint.config.in_channels} channels, codec {codec.name} decodes "
            f"{codec.latent_channels}: pass the right one with --vae"
        )
    scale = checkpoint.codec.get("scale", codec.scale)
    if scale != codec.scale:
        raise ValueError(f"{args.ckpt} was trained on latents times {scale}, codec {codec.name} scales by {codec.scale}")
    if args.compile:
        compile_blocks(model)
    sampler = GaussianSampler(create_diffusion(str(args.num_sampling_steps)), ddim=args.ddim)
    guidance = Guidance(args.cfg_scale, 3 if args.cfg_channels == "3" else None)
    return Pipeline(checkpoint, model, sampler, codec, guidance, amm, autocast_dtype(args.precision))
