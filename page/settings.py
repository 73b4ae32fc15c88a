"""What a page is started with, and what is chosen on it."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from models.checkpoints import Checkpoint
from runtime import cli
from sampling.options import CKPT_HELP, add_sampling_arguments
from sampling.samplers import GAUSSIAN_SOLVERS, SDE_SOLVERS, WATCHABLE_SOLVERS
from sampling.solver_options import SDE_FLAGS, TRANSPORT_FLAGS, add_transport_arguments, build_sampler

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ODE_METHOD = "heun"  # where the flags name none: the scripts' dopri5 cannot be watched
STEPS = 50
EVERYWHERE = (0.0, 1.0)  # noise levels


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = cli.ArgumentParser("A page in the browser: pictures of two settings side by side, as they are made.")
    parser.add_argument("--ckpt", "--ckpts", nargs="+", required=True, metavar="CKPT", help=f"one or more, {CKPT_HELP}")
    add_sampling_arguments(parser, ckpt=False)
    add_transport_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's own open it to all"
    )
    group.add_argument("--port", type=cli.number(int, 1, 65535), default=7860)
    group.add_argument("--max-images", type=cli.positive_int, default=32, help="of each setting, at most")
    group.add_argument("--max-steps", type=cli.positive_int, default=250, help=f"of a solver, at most; it starts with {STEPS}")
    group.add_argument("--max-seconds", type=cli.positive_float, default=900.0, help="after which a job is stopped")
    group.add_argument(
        "--frames",
        type=cli.positive_int,
        default=12,
        help="pictures of the denoising, each to be decoded; 1 = the last only",
    )
    parser.set_defaults(num_sampling_steps=None)
    args = parser.parse_args(argv)
    if args.num_sampling_steps is None:
        args.num_sampling_steps = min(STEPS, args.max_steps)
    args.host = args.host.strip("[]")  # around an IPv6 address
    if args.guide_ckpt:
        parser.error("--guide-ckpt: name the weaker checkpoint as another --ckpt, and choose it on the page")
    if args.num_sampling_steps > args.max_steps:
        parser.error(f"--num-sampling-steps {args.num_sampling_steps} is above --max-steps {args.max_steps}")
    return args


@dataclass(frozen=True, kw_only=True)
class Limits:
    images: int
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Side:
    """How one of the two pictures is made.

    model: a checkpoint's number; None: all take turns. solver: one of :func:`solver_names`. cfg_scale: 1 for no guidance; then
    channels ("3" or "all"), interval (noise levels), power and guide (a weaker checkpoint's number; None: the null label) say
    nothing. amm: "off", "on" for the published placement, or one as "exp:7,10". ratios, first_several_num: of the turns.
    """

    model: int | None = 0
    solver: str
    steps: int
    cfg_scale: float = 1.0
    channels: str = "3"
    interval: tuple[float, float] = EVERYWHERE
    power: float = 0.0
    guide: int | None = None
    amm: str = "off"
    ratios: tuple[float, ...] = ()
    first_several_num: int = 3


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What both sides show: so many pictures of each class, from the same seeds. Raises ValueError for what cannot be shown."""

    labels: tuple[int, ...]
    per_class: int
    seed: int

    def check(self, limits: Limits, num_classes: int) -> None:
        """Raises ValueError for too many, or none."""
        if not self.labels:
            raise ValueError("choose at least one class")
        outside = [label for label in self.labels if not 0 <= label < num_classes]
        if outside:
            raise ValueError(f"class {outside[0]} does not exist: the model has classes 0 to {num_classes - 1}")
        if self.per_class < 1:
            raise ValueError(f"{self.per_class} pictures of a class: choose at least one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: choose a whole number from 0 to 2^63 - 1")
        count = len(self.labels) * self.per_class
        if count > limits.images:
            raise ValueError(
                f"{len(self.labels)} classes with {self.per_class} pictures each are {count} pictures; this page makes at most "
                f"{limits.images} (--max-images): choose fewer"
            )

    @property
    def of_each(self) -> list[int]:
        """The label of image i."""
        return [label for label in self.labels for _ in range(self.per_class)]


def solver_names(checkpoint: Checkpoint) -> list[str]:
    """For what the checkpoint was trained to predict; of a transport with the mode before it. All tell of every step: of others
    a job could neither be watched nor stopped."""
    if checkpoint.objective["name"] == "gaussian":
        return list(GAUSSIAN_SOLVERS)
    return [f"SDE {name}" for name in SDE_SOLVERS] + [f"ODE {name}" for name in WATCHABLE_SOLVERS]


def start_solver(args: Namespace, checkpoint: Checkpoint) -> str:
    """The one of :func:`solver_names` that the flags name. Raises ValueError for flags that do not fit the checkpoint."""
    named = build_sampler(args, checkpoint, ode_method=ODE_METHOD).settings
    gaussian = checkpoint.objective["name"] == "gaussian"
    return _offered(named["solver"] if gaussian else f"{named['sampler']} {named['solver']}", checkpoint)


def _offered(solver: str, checkpoint: Checkpoint) -> str:
    names = solver_names(checkpoint)
    if solver not in names:
        raise ValueError(f"solver {solver!r} cannot be watched with this checkpoint: choose one of {', '.join(names)}")
    return solver


def flags(base: Namespace, side: Side, checkpoint: Checkpoint, limits: Limits) -> Namespace:
    """The command line of the sampling scripts that says the same, without what ``base`` says of other mathematics. Raises
    ValueError for settings out of range."""
    *mode, solver = _offered(side.solver, checkpoint).split()
    if not 1 <= side.steps <= limits.steps:
        raise ValueError(f"{side.steps} steps: this page takes 1 to {limits.steps} (--max-steps)")
    if not 0 <= side.cfg_scale < float("inf"):
        raise ValueError(f"guidance scale {side.cfg_scale}: choose a number of at least 0; 1 is no guidance")
    guided = side.cfg_scale != 1
    low, high = side.interval
    if guided and not 0 <= low < high <= 1:
        raise ValueError(f"guidance from noise level {low:g} to {high:g}: the first must be below the second, both from 0 to 1")
    if guided and not 0 <= side.power < float("inf"):
        raise ValueError(f"guidance power {side.power}: choose a number of at least 0")
    chosen = {
        "mode": mode[0] if mode else None,
        "solver": solver,
        "sampling_method": None,
        "ddim": False,
        "num_sampling_steps": side.steps,
        "cfg_scale": side.cfg_scale,
        "cfg_channels": side.channels if guided else None,
        "guidance_interval": side.interval if guided and side.interval != EVERYWHERE else None,
        "cfg_power": side.power if guided else None,
    }
    meaningless = {None: TRANSPORT_FLAGS, "ODE": SDE_FLAGS, "SDE": ()}[chosen["mode"]]  # given for another side
    return Namespace(**{**vars(base), **dict.fromkeys(meaningless), **chosen})
