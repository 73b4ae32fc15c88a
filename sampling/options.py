"""The flags that the sampling scripts share, and what they build."""

import os
from argparse import Namespace
from dataclasses import dataclass

import torch
from torch import nn

from data.codec import Codec, load_codec
from data.store import PUBLISHED_CODEC
from models import model_names
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.inference import prepare
from models.registry import resolve_amm
from runtime.cli import ArgumentParser, BooleanFlag, seed
from runtime.distributed import check_precision, working_dtype
from runtime.fetch import digest, fetch
from sampling.generate import Guidance
from sampling.guidance_options import add_guidance_arguments, guided_channels, read_guidance, read_guide
from sampling.samplers import Sampler
from sampling.solver_options import add_solver_arguments, build_sampler

CKPT_HELP = "of training or published: a file, a diffusers folder, an URL#sha256=HEX, or a hub id, as OWNER/NAME[/FILE.pt]"


class AMMFlag(BooleanFlag):
    """A boolean that also takes a placement, as exp:7,10."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value is not None and ":" in value and not option_string.startswith("--no-"):
            setattr(namespace, self.dest, value)
        else:
            super().__call__(parser, namespace, value, option_string)


def add_sampling_arguments(parser: ArgumentParser, *, ckpt: bool = True) -> None:
    """ckpt False: the script has its own flags for several checkpoints."""
    if ckpt:
        parser.add_argument("--ckpt", required=True, help=CKPT_HELP)
        parser.add_argument("--amm", action=AMMFlag, help="attention modulation: True = the model's placement, or exp:7,10")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of the checkpoint")
    parser.add_argument("--model", choices=model_names(), help="default: what the checkpoint holds; another one is an error")
    parser.add_argument("--vae", help="decoder: a folder, hub id, sd-vae-ft-ema, -mse or pixels (default: the checkpoint's)")
    add_solver_arguments(parser)
    parser.add_argument("--seed", "--global-seed", type=seed, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--compile", action=BooleanFlag, help="torch.compile the network: takes up to a minute, then faster")
    add_guidance_arguments(parser)


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint ready to sample: what :func:`sampling.generate.generate` takes.

    settings: what its images depend on, besides their seed and labels.
    """

    checkpoint: Checkpoint
    model: nn.Module
    sampler: Sampler
    codec: Codec
    guidance: Guidance
    settings: dict

    @property
    def num_classes(self) -> int:
        return self.checkpoint.config.num_classes

    @property
    def image_size(self) -> int:
        return self.checkpoint.config.input_size * self.codec.downsample


def build_pipeline(args: Namespace, device: torch.device) -> Pipeline:
    """From the flags of :func:`add_sampling_arguments`. Raises ValueError for a checkpoint, codec or flag that does not fit."""
    check_precision(args.precision, device)
    checkpoint = read_checkpoint(fetch(args.ckpt), args.weights, args.model)
    weaker = read_guide(args, checkpoint)
    amm = resolve_amm(args.model or checkpoint.model, args.amm, args.cfg_scale, checkpoint.config.input_size)
    sampler = build_sampler(args, checkpoint)
    model = make_ready(build_model(checkpoint, name=args.model, amm=amm).to(device), args)
    guide = make_ready(build_model(weaker).to(device), args) if weaker else None
    pipeline = assemble(args, checkpoint, model, sampler, device, guide)
    pipeline.settings.update(checkpoint_sha256=digest(checkpoint.path), amm=str(amm or "off"))
    if weaker:
        pipeline.settings.update(guide_sha256=digest(weaker.path), guide_weights=args.guide_weights or "ema")
    return pipeline


def make_ready(model: nn.Module, args: Namespace, varying_batch: bool = False) -> nn.Module:
    """:func:`models.inference.prepare` by the flags."""
    return prepare(model, working_dtype(args.precision), args.compile, varying_batch)


def assemble(
    args: Namespace,
    checkpoint: Checkpoint,
    model: nn.Module,
    sampler: Sampler,
    device: torch.device,
    guide: nn.Module | None = None,
) -> Pipeline:
    """checkpoint: says which codec decodes. model, guide: on the device, in eval mode."""
    codec, guidance = find_codec(args.vae, checkpoint, device), read_guidance(args, checkpoint.objective, guide)
    is_guided = args.cfg_scale != 1
    settings = {
        "weights": args.weights,
        "codec": codec.name,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": guided_channels(args) if is_guided else None,
        "guidance_interval": args.guidance_interval,
        "cfg_power": (is_guided and guidance.around(model).power) or None,
        **sampler.settings,
        "precision": args.precision,
    }
    return Pipeline(checkpoint, model, sampler, codec, guidance, settings)


def find_codec(name: str | None, checkpoint: Checkpoint, device: torch.device) -> Codec:
    """name: None for the checkpoint's own. Raises ValueError for one that does not fit the checkpoint's latents."""
    codec = load_codec(name or checkpoint.codec.get("name", PUBLISHED_CODEC), device)
    if codec.latent_channels != checkpoint.config.in_channels:
        raise ValueError(
            f"{checkpoint.path} makes latents of {checkpoint.config.in_channels} channels, codec {codec.name} decodes "
            f"{codec.latent_channels}: pass the right one with --vae"
        )
    scale = checkpoint.codec.get("scale", codec.scale)
    if scale != codec.scale:
        raise ValueError(f"{checkpoint.path} was trained on latents times {scale}, codec {codec.name} scales by {codec.scale}")
    return codec


def check_held(flag: str, asked: int | None, held: int | None, path: str | os.PathLike) -> None:
    """Raises ValueError where a checkpoint holds something else than the user believes; None believes nothing."""
    if asked is not None and asked != held:
        raise ValueError(f"{flag} {asked}: {path} has {held or 'none'}; leave the flag out, or pass the right checkpoint")
