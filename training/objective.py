"""What a network is trained to predict: the noise of Gaussian diffusion, or a transport's velocity. Any network, either one."""

from dataclasses import dataclass

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.timesteps import SAMPLERS, ContinuousSampler, UniformSampler
from diffusion.transport import Transport, create_transport
from diffusion.transport.paths import PATHS
from diffusion.transport.transport import LOSS_WEIGHTS, PREDICTIONS
from runtime.cli import ArgumentParser, non_negative_float

OBJECTIVES = ("gaussian", "transport")
DEFAULT_TIMESTEP_SAMPLER, DEFAULT_MIN_SNR_GAMMA = "loss-second-moment", 5.0  # the EDT paper's


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
    group.add_argument(
        "--timestep-sampler", choices=tuple(SAMPLERS), help=f"gaussian only (default: {DEFAULT_TIMESTEP_SAMPLER})"
    )
    group.add_argument(
        "--min-snr-gamma",
        type=non_negative_float,
        help=f"gaussian only: weigh the error by min(SNR, gamma)/SNR; 0 = no weight (default: {DEFAULT_MIN_SNR_GAMMA})",
    )
    group.add_argument("--path-type", choices=tuple(PATHS), help="transport only (default: Linear)")
    group.add_argument("--prediction", choices=PREDICTIONS, help="transport only (default: velocity)")
    group.add_argument(
        "--loss-weight", choices=tuple(map(str, LOSS_WEIGHTS)), help="transport only, of noise and score prediction"
    )
    group.add_argument("--train-eps", type=non_negative_float, help="transport only: times kept away from the ends in training")
    group.add_argument(
        "--sample-eps", type=non_negative_float, help="transport only: times kept away from the ends in sampling"
    )


def objective_name(args) -> str:
    return args.objective or ("transport" if args.model.startswith("SiT") else "gaussian")


def create_objective(args) -> Objective:
    """From the flags of :func:`add_objective_arguments`. Raises ValueError for a flag of the other objective."""
    name = objective_name(args)
    foreign = {
        "transport": ("timestep_sampler", "min_snr_gamma"),
        "gaussian": ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps"),
    }[name]
    for flag in foreign:
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} means nothing to --objective {name}: leave it out")
    if name == "gaussian":
        gamma = DEFAULT_MIN_SNR_GAMMA if args.min_snr_gamma is None else args.min_snr_gamma
        sampler = SAMPLERS[args.timestep_sampler or DEFAULT_TIMESTEP_SAMPLER]()
        return Objective(create_diffusion(min_snr_gamma=gamma or None), sampler, {"name": name})
    transport = create_transport(
        args.path_type or "Linear", args.prediction or "velocity", args.loss_weight, args.train_eps, args.sample_eps
    )
    return Objective(transport, ContinuousSampler(*transport.interval), {"name": name, **transport.describe()})
