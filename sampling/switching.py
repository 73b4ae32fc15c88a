"""Sampling with several checkpoints, image by image switching from the cheapest to the next: flags, pipeline and report."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusion.transport import ODE
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.macs import multiply_accumulates
from models.registry import size
from models.stepwise import DISTANCES, StepwiseNetwork, SwitchPolicy
from runtime.cli import ArgumentParser, positive_float, positive_int
from runtime.distributed import check_precision, note
from runtime.fetch import digest, fetch
from sampling.alike import COMMON, require_common
from sampling.options import CKPT_HELP, Pipeline, assemble, check_held, make_ready
from sampling.samplers import WATCHABLE_SOLVERS, SwitchingSampler
from sampling.solver_options import build_sampler
from sampling.writers import Table

PUBLISHED_STAGES = 3
ODE_METHODS = "euler, heun, ab2, ab3 or ab4 (default: euler)"  # those that can be watched step by step

# What models that take turns must have in common: they differ in their attention alone.
SHARED = {
    **COMMON,
    "size": lambda checkpoint: ", ".join(f"{name} {value}" for name, value in size(checkpoint.config).items()),
}


@dataclass(frozen=True)
class Stage:
    """One of the models: its checkpoint's path, and the number of mediators it is believed to have (None: whatever it has)."""

    path: str
    mediator_num: int | None = None


def add_stage_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("models, the cheapest first: three as published, or any number with --ckpts")
    for i in range(1, PUBLISHED_STAGES + 1):
        group.add_argument(f"--ckpt{i}", metavar="CKPT", help=CKPT_HELP if i == 1 else "likewise")
        group.add_argument(f"--mediator-num{i}", type=positive_int, metavar="M", help="checked against the checkpoint")
    group.add_argument("--ckpts", nargs="+", metavar="CKPT", help="in place of --ckpt1, --ckpt2, --ckpt3")
    group.add_argument("--first-several-num", type=positive_int, default=3, help="changes whose mean is the reference")
    group.add_argument(
        "--distance-func", "--distence-func", choices=tuple(DISTANCES), default="mae", help="how a change is measured"
    )


def add_ratio_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("when to switch: as soon as a step changes the state by less than ratio * reference")
    for i in range(1, PUBLISHED_STAGES):
        group.add_argument(f"--switch-ratio{i}", type=positive_float, metavar="R")
    group.add_argument(
        "--switch-ratios", type=positive_float, nargs="+", metavar="R", help="with --ckpts: one fewer than models"
    )


def read_stages(parser: ArgumentParser, args: Namespace) -> list[Stage]:
    """The models named on the command line; a usage error where they are named in both ways, or in none."""
    numbered = [getattr(args, f"ckpt{i}") for i in range(1, PUBLISHED_STAGES + 1)]
    if args.ckpts:
        if any(numbered) or any(getattr(args, f"mediator_num{i}") for i in range(1, PUBLISHED_STAGES + 1)):
            parser.error("--ckpts stands in place of --ckpt1, --mediator-num1 and so on: use one of them")
        return [Stage(path) for path in args.ckpts]
    if None in numbered:
        parser.error(f"--ckpt{numbered.index(None) + 1} is missing; for another number of models use --ckpts")
    return [Stage(path, getattr(args, f"mediator_num{i}")) for i, path in enumerate(numbered, start=1)]


def read_ratios(parser: ArgumentParser, args: Namespace, num_stages: int) -> tuple[float, ...]:
    """A usage error where they are not one fewer than the models."""
    numbered = [getattr(args, f"switch_ratio{i}") for i in range(1, PUBLISHED_STAGES)]
    ratios = [ratio for ratio in numbered if ratio is not None]
    if args.switch_ratios:
        if ratios:
            parser.error("--switch-ratios stands in place of --switch-ratio1, --switch-ratio2: use one of them")
        ratios = args.switch_ratios
    if len(ratios) != num_stages - 1:
        parser.error(f"{num_stages} models need {num_stages - 1} switch ratio(s), got {len(ratios)}")
    return tuple(ratios)


@dataclass(frozen=True)
class Switching:
    """checkpoint: the first one. paths: of all, the files that hold the weights."""

    checkpoint: Checkpoint
    paths: tuple[Path, ...]
    network: StepwiseNetwork
    sampler: SwitchingSampler


def switching_pipeline(args: Namespace, stages: Sequence[Stage], policy: SwitchPolicy, device: torch.device) -> Pipeline:
    """:func:`build_switching`, with what turns latents into images."""
    switching = build_switching(args, stages, policy, device)
    pipeline = assemble(args, switching.checkpoint, switching.network, switching.sampler, device)
    pipeline.settings["checkpoints_sha256"] = [digest(path) for path in switching.paths]
    return pipeline


def build_switching(args: Namespace, stages: Sequence[Stage], policy: SwitchPolicy, device: torch.device) -> Switching:
    """Raises ValueError for checkpoints that do not fit one another or the flags."""
    check_precision(args.precision, device)
    if args.guide_ckpt:
        raise ValueError(
            f"--guide-ckpt {args.guide_ckpt}: models that take turns are guided by classifier-free guidance alone, which the "
            "report of their cost counts; leave it out"
        )
    checkpoints = [read_checkpoint(fetch(stage.path), args.weights, args.model) for stage in stages]
    for i, (checkpoint, stage) in enumerate(zip(checkpoints, stages, strict=True), start=1):
        held = getattr(checkpoint.config, "mediator_num", None)
        check_held(f"--mediator-num{i}", stage.mediator_num, held, stage.path)
    for other in checkpoints[1:]:
        require_common(checkpoints[0], other, "models that take turns", SHARED)
    sampler = build_sampler(args, checkpoints[0], ode_method="euler")
    if isinstance(sampler.process, ODE) and not sampler.process.fixed:
        raise ValueError(
            f"{'--solver' if args.solver else '--sampling-method'} {sampler.process.sampling_method} cannot be watched step by "
            f"step: use one of {', '.join(WATCHABLE_SOLVERS)}"
        )
    models = [build_model(checkpoint, name=args.model).to(device) for checkpoint in checkpoints]
    for model in models:
        make_ready(model, args, varying_batch=True)
    network = StepwiseNetwork(models, policy).eval()
    cost = gmacs(network)
    if (np.diff(cost) < 0).any():
        note(f"the models do not grow: a call costs {', '.join(f'{gmac:.4g}' for gmac in cost)} GMAC in the order given")
    paths = tuple(checkpoint.path for checkpoint in checkpoints)
    return Switching(checkpoints[0], paths, network, SwitchingSampler(sampler, network))


def gmacs(network: StepwiseNetwork) -> np.ndarray:
    """Of one evaluation by each model, (num_stages,)."""
    return np.array([multiply_accumulates(model.config) for model in network.models]) / 1e9


def switch_table(network: StepwiseNetwork) -> Table:
    """For each image: the solver step after which it went on to each next model (-1: never), the evaluations by each model,
    guidance's unconditional ones included, and what they cost together."""
    cost, numbers = gmacs(network), range(1, len(network.models) + 1)

    def rows(batch) -> np.ndarray:
        evaluations = batch.records["evaluations"].numpy()
        return np.column_stack([batch.records["switch_steps"].numpy(), evaluations, evaluations @ cost])

    columns = [f"switch_{i}_to_{i + 1}" for i in numbers[:-1]] + [f"evaluations_{i}" for i in numbers] + ["gmac"]
    return Table("switch_steps.csv", tuple(columns), rows)


def summary(network: StepwiseNetwork, table: np.ndarray) -> str:
    """What the images cost, in lines; a guided call counts twice. table: of :func:`switch_table`, (N, columns)."""
    cost, stages = gmacs(network), len(network.models)
    evaluations = table[:, stages - 1 : 2 * stages - 1]
    total = evaluations.sum()
    lines = [f"{'model':>7}{'mediators':>11}{'GMAC a call':>13}{'calls an image':>16}{'share':>8}"]
    for i, model in enumerate(network.models):
        mediators = getattr(model.config, "mediator_num", None) or "-"
        mean = evaluations[:, i].mean()
        lines.append(f"{i + 1:>7}{mediators:>11}{cost[i]:>13.4g}{mean:>16.1f}{evaluations[:, i].sum() / total:>8.1%}")
    average, last = table[:, -1].sum() / total, cost[-1]
    lines.append(
        f"GMAC a call on average {average:.4g}, {average / last:.1%} of the last model's; {table[:, -1].mean():.4g} an image"
    )
    return "\n".join(lines)
