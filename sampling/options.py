"""The flags that the sampling scripts share, and what they build."""

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from data.codec import Codec, load_codec
from data.store import PUBLISHED_CODEC
from diffusion import create_diffusion
from diffusion.guidance import check_interval
from diffusion.transport import ODE, SDE, Transport, create_transport
from diffusion.transport.paths import DIFFUSION_FORMS, PATHS, PUBLISHED_SPELLINGS
from diffusion.transport.transport import PREDICTIONS
from models import model_names
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.inference import prepare
from models.registry import resolve_amm
from runtime.cli import ArgumentParser, BooleanFlag, non_negative_float, number, positive_float, seed
from runtime.distributed import check_precision, working_dtype
from runtime.fetch import digest, fetch
from sampling.generate import Guidance
from sampling.samplers import GaussianSampler, Sampler, TransportSampler, transport_settings

CKPT_HELP = "of training or published: a file, a diffusers folder, an URL#sha256=HEX, or a hub id, as OWNER/NAME[/FILE.pt]"
LAST_STEPS = ("Mean", "Tweedie", "Euler", "None")


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
        parser.add_argument(
            "--cfg-power",
            type=non_negative_float,
            help="MDTv2: guidance grows with time as a power-cosine; 0 = the same at all times (default: 4, as published)",
        )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of the checkpoint")
    parser.add_argument("--model", choices=model_names(), help="default: what the checkpoint holds; another one is an error")
    parser.add_argument("--vae", help="decoder: a folder, hub id, sd-vae-ft-ema, -mse or pixels (default: the checkpoint's)")
    parser.add_argument("--cfg-scale", type=non_negative_float, default=1.0, help="classifier-free guidance; 1 = none")
    parser.add_argument(
        "--cfg-channels", choices=("3", "all"), default="3", help="latent channels that are guided; 3 as published"
    )
    parser.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="guide only at noise levels from LOW to HIGH, where 1 is pure noise and 0 data; outside, a step costs half",
    )
    parser.add_argument(
        "--num-sampling-steps",
        type=number(int, 1, 10**6),
        default=250,
        help="of a transport: points in time, the last step not counted",
    )
    parser.add_argument("--ddim", action=BooleanFlag, help="Gaussian diffusion: DDIM instead of ancestral sampling")
    parser.add_argument("--seed", "--global-seed", type=seed, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--compile", action=BooleanFlag, help="torch.compile the network: takes up to a minute, then faster")


def interval(text: str) -> tuple[float, float]:
    """ "0.2,0.8" -> (0.2, 0.8), an argparse type."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH: write two numbers, for example 0.2,0.8") from None
    try:
        return check_interval((low, high))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# Which flags belong to what; given to something else they are refused, not ignored.
SDE_FLAGS = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
ODE_FLAGS = ("atol", "rtol", "per_sample_solver", "likelihood")
TRANSPORT_FLAGS = ("sampling_method", "path_type", "prediction", "sample_eps", *SDE_FLAGS, *ODE_FLAGS)


def add_transport_arguments(
    parser: ArgumentParser,
    *,
    positional_mode: bool = False,
    ode_methods: str = "euler, heun, ab2, ab3, ab4, dopri5 or another of torchdiffeq's (default: dopri5)",
) -> None:
    """For checkpoints trained as transports (SiT). positional_mode: as in the mediator system's scripts, ``script.py SDE``.
    ode_methods: what the help says of them."""
    group = parser.add_argument_group("transport")
    if positional_mode:
        group.add_argument("mode", choices=("ODE", "SDE"))
    else:
        group.add_argument("--mode", choices=("ODE", "SDE"), help="default: SDE")
    group.add_argument("--sampling-method", help=f"SDE: Euler or Heun (default: Euler); ODE: {ode_methods}")
    forms = (*DIFFUSION_FORMS, *PUBLISHED_SPELLINGS)
    group.add_argument("--diffusion-form", choices=forms, help="SDE: the noise level's shape (default: sigma)")
    group.add_argument("--diffusion-norm", type=positive_float, help="SDE: and its height (default: 1)")
    group.add_argument("--last-step", choices=LAST_STEPS, help="SDE: how the remaining noise is removed (default: Mean)")
    group.add_argument("--last-step-size", type=positive_float, help="SDE: of the time, which ends at 1 (default: 0.04)")
    group.add_argument("--atol", type=positive_float, help="ODE: absolute tolerance of adaptive methods (default: 1e-6)")
    group.add_argument("--rtol", type=positive_float, help="ODE: relative tolerance of adaptive methods (default: 1e-3)")
    group.add_argument(
        "--per-sample-solver", action=BooleanFlag, help="ODE: solve each sample by itself: slower, the same for any batch size"
    )
    group.add_argument("--path-type", choices=tuple(PATHS), help="default: the checkpoint's, else Linear")
    group.add_argument("--prediction", choices=PREDICTIONS, help="default: the checkpoint's, else velocity")
    group.add_argument(
        "--sample-eps", type=non_negative_float, help="times kept away from the ends (default: the checkpoint's)"
    )


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
    amm = resolve_amm(args.model or checkpoint.model, args.amm, args.cfg_scale, checkpoint.config.input_size)
    model = build_model(checkpoint, name=args.model, amm=amm).to(device)
    if args.cfg_power is not None:
        set_cfg_power(model, args, checkpoint)
    make_ready(model, args)
    pipeline = assemble(args, checkpoint, model, build_sampler(args, checkpoint), device)
    pipeline.settings.update(checkpoint_sha256=digest(checkpoint.path), amm=str(amm or "off"))
    if hasattr(model, "cfg_power"):
        pipeline.settings["cfg_power"] = model.cfg_power
    return pipeline


def make_ready(model: nn.Module, args: Namespace, varying_batch: bool = False) -> None:
    """:func:`models.inference.prepare` by the flags."""
    prepare(model, working_dtype(args.precision), args.compile, varying_batch)


def set_cfg_power(model: nn.Module, args: Namespace, checkpoint: Checkpoint) -> None:
    """Raises ValueError where guidance does not depend on time, or there is none."""
    if not hasattr(model, "cfg_power"):
        raise ValueError(
            f"--cfg-power {args.cfg_power:g} belongs to MDTv2: the checkpoint holds another network; leave the flag out"
        )
    if checkpoint.objective["name"] == "transport":
        _refuse(args, ("cfg_power",), f"{checkpoint.path}, which is a transport, guided alike at all times")
    if args.cfg_scale == 1:
        _refuse(args, ("cfg_power",), "samples without guidance (--cfg-scale 1)")
    model.cfg_power = args.cfg_power


def assemble(args: Namespace, checkpoint: Checkpoint, model: nn.Module, sampler: Sampler, device: torch.device) -> Pipeline:
    """checkpoint: says which codec decodes. model: on the device, in eval mode."""
    codec = find_codec(args.vae, checkpoint, device)
    settings = {
        "weights": args.weights,
        "codec": codec.name,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "guidance_interval": args.guidance_interval,
        **sampler.settings,
        "precision": args.precision,
    }
    return Pipeline(checkpoint, model, sampler, codec, read_guidance(args), settings)


def read_guidance(args: Namespace) -> Guidance:
    """Raises ValueError for an interval of no guidance."""
    if args.cfg_scale == 1:
        _refuse(args, ("guidance_interval",), "samples without guidance (--cfg-scale 1)")
    return Guidance(args.cfg_scale, 3 if args.cfg_channels == "3" else None, args.guidance_interval)


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


def build_sampler(args: Namespace, checkpoint: Checkpoint, *, ode_method: str = "dopri5") -> GaussianSampler | TransportSampler:
    """The sampler for what the checkpoint was trained to predict. ode_method: in place of the flag's default."""
    if checkpoint.objective["name"] == "gaussian":
        if args.mode:
            raise ValueError(
                f"mode {args.mode}: {checkpoint.path} was trained for Gaussian diffusion, which has neither ODE nor SDE here: "
                "sample it with sample_ddp.py at the root, without --mode"
            )
        _refuse(args, TRANSPORT_FLAGS, f"{checkpoint.path}, which was trained for Gaussian diffusion")
        return GaussianSampler(create_diffusion(str(args.num_sampling_steps)), ddim=args.ddim)
    _refuse(args, ("ddim",), f"{checkpoint.path}, which is a transport (use --mode ODE)")
    transport = _transport(args, checkpoint)
    if args.mode == "ODE":
        _refuse(args, SDE_FLAGS, "the mode ODE")
        given = _given(args, ("atol", "rtol"))
        method = args.sampling_method or ode_method
        ode = ODE(transport, method, args.num_sampling_steps, per_sample=args.per_sample_solver, **given)
        if ode.fixed:
            _refuse(args, ("atol", "rtol", "per_sample_solver"), f"the fixed steps of {method}")
        return TransportSampler(ode, likelihood=getattr(args, "likelihood", False))
    _refuse(args, ODE_FLAGS, "the mode SDE")
    if args.last_step == "None":
        _refuse(args, ("last_step_size",), "a sampler without a last step")
    given = {"diffusion_form": "sigma", **_given(args, ("sampling_method", *SDE_FLAGS))}
    if given["diffusion_form"] == "SBDM" and args.sample_eps == 0 and transport.path.starts_at_noise:
        raise ValueError("--diffusion-form SBDM is infinite at time 0: give a --sample-eps above 0, as 1e-3, or leave it out")
    return TransportSampler(SDE(transport, num_steps=args.num_sampling_steps, **given))


def _given(args: Namespace, flags: Sequence[str]) -> dict:
    return {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}


def _refuse(args: Namespace, flags: Sequence[str], what: str) -> None:
    """A flag that would be ignored is a mistake about what is being done."""
    for flag in flags:
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"--{flag.replace('_', '-')} {shown} means nothing to {what}: leave it out")


def _transport(args: Namespace, checkpoint: Checkpoint) -> Transport:
    """What the checkpoint states; where it states nothing (a published one), the flags, else the published defaults."""
    stated = transport_settings(checkpoint.objective)
    for flag in ("path_type", "prediction"):
        asked = getattr(args, flag)
        if asked and asked != stated.get(flag, asked):
            raise ValueError(
                f"--{flag.replace('_', '-')} {asked}: {checkpoint.path} was trained with {stated[flag]}; leave the flag out"
            )
        stated |= {flag: asked} if asked else {}
    if args.sample_eps is not None:
        stated["sample_eps"] = args.sample_eps
    return create_transport(**stated)
