"""The flags that say how a checkpoint is sampled, and the sampler they build."""

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Sequence

from diffusion.transport import ODE, SDE, Transport, create_transport
from diffusion.transport.paths import DIFFUSION_FORMS, PATHS, PUBLISHED_SPELLINGS
from diffusion.transport.transport import PREDICTIONS
from models.checkpoints import Checkpoint
from runtime.cli import ArgumentParser, BooleanFlag, non_negative_float, number, positive_float
from sampling.samplers import (
    GAUSSIAN_SOLVERS,
    ODE_SOLVERS,
    OFFERED,
    SDE_SOLVERS,
    FewStepsSampler,
    GaussianSampler,
    TransportSampler,
    gaussian_sampler,
    transport_settings,
)

LAST_STEPS = ("Mean", "Tweedie", "Euler", "None")
TRANSPORT_SOLVERS = tuple(dict.fromkeys((*ODE_SOLVERS, *SDE_SOLVERS)))


# Which flags belong to what; given to something else they are refused, not ignored.
SDE_FLAGS = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
ODE_FLAGS = ("atol", "rtol", "per_sample_solver", "likelihood")
TRANSPORT_FLAGS = ("sampling_method", "path_type", "prediction", "sample_eps", *SDE_FLAGS, *ODE_FLAGS)


def solver(text: str) -> str:
    """ "AB2" -> "ab2", an argparse type. Which mathematics it belongs to is known with the checkpoint."""
    name = OFFERED.get(text.lower(), text.lower())
    known = tuple(dict.fromkeys((*GAUSSIAN_SOLVERS, *TRANSPORT_SOLVERS)))
    if name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return name


def add_solver_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--solver",
        type=solver,
        metavar="NAME",
        help=f"Gaussian diffusion: {', '.join(GAUSSIAN_SOLVERS)} (default: ancestral); transport: as --sampling-method, and "
        "of the ODE unless the mode is SDE. dpm++2m, unipc and ab4 are for 10 to 30 steps",
    )
    parser.add_argument(
        "--num-sampling-steps",
        type=number(int, 1, 10**6),
        default=250,
        help="of a transport: points in time, the last step not counted",
    )
    parser.add_argument("--ddim", action=BooleanFlag, help="the same as --solver ddim")


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


def build_sampler(
    args: Namespace, checkpoint: Checkpoint, *, ode_method: str = "dopri5"
) -> GaussianSampler | FewStepsSampler | TransportSampler:
    """The sampler for what the checkpoint was trained to predict. ode_method: in place of the flag's default."""
    gaussian = checkpoint.objective["name"] == "gaussian"
    _check_solver(args, checkpoint, GAUSSIAN_SOLVERS if gaussian else TRANSPORT_SOLVERS)
    return _gaussian_sampler(args, checkpoint) if gaussian else _transport_sampler(args, checkpoint, ode_method)


def _check_solver(args: Namespace, checkpoint: Checkpoint, fitting: Sequence[str]) -> None:
    if args.solver and args.solver not in fitting:
        trained = "is a transport" if fitting is TRANSPORT_SOLVERS else "was trained for Gaussian diffusion"
        raise ValueError(f"--solver {args.solver}: {checkpoint.path} {trained}, which takes one of {', '.join(fitting)}")
    if args.ddim and args.solver not in (None, "ddim"):
        raise ValueError(f"--ddim and --solver {args.solver} name two solvers: leave one of them out")


def _gaussian_sampler(args: Namespace, checkpoint: Checkpoint) -> GaussianSampler | FewStepsSampler:
    if args.mode:
        raise ValueError(
            f"mode {args.mode}: {checkpoint.path} was trained for Gaussian diffusion, which has neither ODE nor SDE here: "
            "sample it with sample_ddp.py at the root, without --mode"
        )
    refuse(args, TRANSPORT_FLAGS, f"{checkpoint.path}, which was trained for Gaussian diffusion")
    try:
        return gaussian_sampler(args.solver or ("ddim" if args.ddim else "ancestral"), args.num_sampling_steps)
    except ValueError as error:
        raise ValueError(f"--num-sampling-steps {args.num_sampling_steps}: {error}") from None


def _transport_sampler(args: Namespace, checkpoint: Checkpoint, ode_method: str) -> TransportSampler:
    refuse(args, ("ddim",), f"{checkpoint.path}, which is a transport (use --mode ODE)")
    transport, method = _transport(args, checkpoint), _method(args)
    if args.mode == "ODE" or (args.mode is None and args.solver):
        refuse(args, SDE_FLAGS, "the mode ODE" if args.mode else f"the ODE, which --solver {args.solver} solves")
        return _ode_sampler(args, transport, method or ode_method)
    if args.solver and args.solver not in SDE_SOLVERS:
        raise ValueError(f"--solver {args.solver} solves the ODE only: the mode SDE takes {' or '.join(SDE_SOLVERS)}")
    refuse(args, ODE_FLAGS, "the mode SDE")
    if args.last_step == "None":
        refuse(args, ("last_step_size",), "a sampler without a last step")
    given = {"diffusion_form": "sigma", **_given(args, SDE_FLAGS)} | ({"sampling_method": method} if method else {})
    if given["diffusion_form"] == "SBDM" and args.sample_eps == 0 and transport.path.starts_at_noise:
        raise ValueError("--diffusion-form SBDM is infinite at time 0: give a --sample-eps above 0, as 1e-3, or leave it out")
    return TransportSampler(SDE(transport, num_steps=args.num_sampling_steps, **given))


def _method(args: Namespace) -> str | None:
    """--solver and --sampling-method say the same thing, in our words and in the published ones."""
    published = args.sampling_method
    if args.solver and published and OFFERED.get(published.lower(), published.lower()) != args.solver:
        raise ValueError(f"--solver {args.solver} and --sampling-method {published} name two solvers: leave one of them out")
    return args.solver or published


def _ode_sampler(args: Namespace, transport: Transport, method: str) -> TransportSampler:
    num_points = args.num_sampling_steps
    ode = ODE(transport, method, per_sample=args.per_sample_solver, **_given(args, ("atol", "rtol")))
    if ode.fixed:
        refuse(args, ("atol", "rtol", "per_sample_solver"), f"the fixed steps of {method}")
    try:
        ode = dataclasses.replace(ode, num_steps=num_points)
    except ValueError as error:
        raise ValueError(f"--num-sampling-steps {num_points}: {error}") from None
    return TransportSampler(ode, likelihood=getattr(args, "likelihood", False))


def _given(args: Namespace, flags: Sequence[str]) -> dict:
    return {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}


def refuse(args: Namespace, flags: Sequence[str], what: str) -> None:
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
