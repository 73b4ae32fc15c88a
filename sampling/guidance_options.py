"""The flags that say how samples are guided, and what they build."""

import argparse
from argparse import Namespace

from torch import nn

from diffusion.guidance import check_interval
from models.checkpoints import Checkpoint, read_checkpoint
from runtime.cli import ArgumentParser, non_negative_float
from runtime.distributed import note
from runtime.fetch import digest, fetch
from sampling.alike import require_common
from sampling.generate import Guidance
from sampling.solver_options import refuse

GUIDANCE_FLAGS = ("cfg_channels", "guidance_interval", "cfg_power", "guide_ckpt", "guide_weights")


def add_guidance_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--cfg-scale", type=non_negative_float, default=1.0, help="of classifier-free guidance, or of --guide-ckpt's; 1 = none"
    )
    group.add_argument(
        "--cfg-channels",
        choices=("3", "all"),
        help="latent channels that are guided (default: 3, as published; with --guide-ckpt all)",
    )
    group.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="guide only at noise levels from LOW to HIGH, where 1 is pure noise and 0 data; outside, a step costs half",
    )
    group.add_argument(
        "--cfg-power",
        type=non_negative_float,
        metavar="POWER",
        help="guidance grows as the noise falls, by a power-cosine, the later the higher; 0 = the same at all noise levels "
        "(default: 4 for MDTv2 of Gaussian diffusion, as published, else 0)",
    )
    group.add_argument(
        "--guide-ckpt",
        metavar="CKPT",
        help="autoguidance: guide away from this weaker checkpoint of the same data, a smaller model's or an earlier step's, "
        "in place of the null label; --amm is not for it",
    )
    group.add_argument("--guide-weights", choices=("ema", "model"), help="which weights of --guide-ckpt (default: ema)")


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


def read_guidance(args: Namespace, objective: dict, guide: nn.Module | None = None) -> Guidance:
    """objective: of the guided checkpoint. guide: the network of ``--guide-ckpt``. Raises ValueError for flags of a guidance
    that there is not."""
    check_guidance(args)
    power = published_power(objective) if args.cfg_power is None else args.cfg_power
    return Guidance(args.cfg_scale, 3 if guided_channels(args) == "3" else None, args.guidance_interval, power, guide)


def check_guidance(args: Namespace) -> None:
    """Raises ValueError for flags that would be ignored."""
    if args.cfg_scale == 1:
        refuse(args, GUIDANCE_FLAGS, "samples without guidance (--cfg-scale 1)")
    if not args.guide_ckpt:
        refuse(args, ("guide_weights",), "samples without --guide-ckpt")


def guided_channels(args: Namespace) -> str:
    """3 is the protocol of classifier-free guidance; autoguidance was published with all."""
    return args.cfg_channels or ("all" if args.guide_ckpt else "3")


def published_power(objective: dict) -> float | None:
    """Of :class:`sampling.generate.Guidance`, for a checkpoint's objective: the network's own; that of a transport is 0, since
    MDTv2's schedule was published for the noise of Gaussian diffusion."""
    return 0.0 if objective["name"] == "transport" else None


def read_guide(args: Namespace, checkpoint: Checkpoint) -> Checkpoint | None:
    """``--guide-ckpt``, checked against the checkpoint that it guides; None without it. Raises ValueError where they do not fit
    one another, and for a network that would guide itself."""
    check_guidance(args)
    if not args.guide_ckpt:
        return None
    weights = args.guide_weights or "ema"
    guide = read_checkpoint(fetch(args.guide_ckpt), weights)
    require_common(checkpoint, guide, "a model and its guide")
    if weights == args.weights and not args.amm and digest(guide.path) == digest(checkpoint.path):
        raise ValueError(
            f"--guide-ckpt {args.guide_ckpt} holds the weights that it would guide, which changes nothing: pass a weaker "
            "checkpoint, as a smaller model's or an earlier step's"
        )
    names = [one.codec.get("name") for one in (checkpoint, guide)]
    if None not in names and names[0] != names[1]:
        note(f"{checkpoint.path} names the codec {names[0]}, its guide {names[1]}: their latents must be the same")
    return guide
