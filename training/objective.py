"""What a network is trained to predict: the noise of Gaussian diffusion, or a transport's velocity. Any network, either one."""

from argparse import Namespace
from dataclasses import dataclass

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.timesteps import SAMPLERS, ContinuousSampler, UniformSampler
from diffusion.transport import Transport, create_transport
from diffusion.transport.paths import PATHS
from diffusion.transport.transport import LOSS_WEIGHTS, PREDICTIONS
from models.registry import FAMILIES, model_config
from runtime.cli import ArgumentParser, non_negative_float

OBJECTIVES = ("gaussian", "transport")
DEFAULTS = {
    "gaussian": {"timestep_sampler": "loss-second-moment", "min_snr_gamma": 5.0},  # the EDT paper's
    "transport": {
        "path_type": "Linear",
        "prediction": "velocity",
        "loss_weight": "None",
        "train_eps": None,
        "sample_eps": None,
    },
}


@dataclass(frozen=True)
class Objective:
    """mathematics: gives the losses. timestep_sampler: draws what they are asked at. facts: the checkpoint's entry, from which
    sampling builds the same mathematics again."""

    mathematics: GaussianDiffusion | Transport
    timestep_sampler: UniformSampler | ContinuousSampler
    facts: dict


def add_objective_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="gaussian: noise prediction in 1000 steps; transport: a path from noise to data (default: transport for SiT)",
    )
    group.add_argument("--timestep-sampler", choices=tuple(SAMPLERS), help="gaussian only (default: loss-second-moment)")
    group.add_argument(
        "--min-snr-gamma",
        type=non_negative_float,
        help="gaussian only: weigh the error by min(SNR, gamma)/SNR; 0 = no weight (default: 5)",
    )
    group.add_argument("--path-type", choices=tuple(PATHS), help="transport only (default: Linear)")
    group.add_argument("--prediction", choices=PREDICTIONS, help="transport only (default: velocity)")
    group.add_argument(
        "--loss-weight",
        choices=tuple(map(str, LOSS_WEIGHTS)),
        help="transport only, of noise and score prediction (default: None, which is 1)",
    )
    group.add_argument(
        "--train-eps",
        type=non_negative_float,
        help="transport only: time left out at the ends; default: 1e-5 on VP, 0 for velocity on the others, else 1e-3",
    )
    group.add_argument(
        "--sample-eps",
        type=non_negative_float,
        help="transport only: time left out at the ends in sampling; default: 0 for velocity but on VP, else 1e-3",
    )


def resolve_objective(parser: ArgumentParser, args: Namespace) -> None:
    """Put the defaults in the place of what was not given, so that two command lines that mean the same are the same; a usage
    error for a flag of the other objective."""
    args.objective = args.objective or FAMILIES[type(model_config(args.model))].objective
    foreign = DEFAULTS["gaussian" if args.objective == "transport" else "transport"]
    for flag in foreign:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} means nothing to --objective {args.objective}: leave it out")
    for flag, default in DEFAULTS[args.objective].items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if args.loss_weight not in (None, "None") and args.prediction == "velocity":
        parser.error(f"--loss-weight {args.loss_weight} is of --prediction noise or score, velocity has none: leave it out")


def create_objective(args: Namespace) -> Objective:
    """From the resolved flags of :func:`add_objective_arguments`."""
    if args.objective == "gaussian":
        mathematics = create_diffusion(min_snr_gamma=args.min_snr_gamma or None)
        return Objective(mathematics, SAMPLERS[args.timestep_sampler](), {"name": "gaussian"})
    transport = create_transport(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)
    return Objective(transport, ContinuousSampler(*transport.interval), {"name": "transport", **transport.describe()})
