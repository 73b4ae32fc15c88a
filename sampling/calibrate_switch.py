"""Propose switch ratios for a compute budget, from a small run.

    python -m sampling.calibrate_switch SDE --ckpt1 CKPT4 --ckpt2 CKPT16 --ckpt3 CKPT64 --budget-gmac 5.6

The budget is the GMAC of a network call on average over an image's sampling: between the first model's and the last one's.
Of all ways to share the calls out that meet it, the one of highest entropy is aimed at: calls in proportion to exp(lambda *
GMAC), lambda as the budget says. The ratios that bring it about are found on recorded runs, and the proposal is what a last
run measured.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from data.codec import PixelCodec
from models.stepwise import DISTANCES, StageTracker, SwitchPolicy
from runtime import cli
from runtime.distributed import start
from sampling.generate import generate, label_source
from sampling.guidance_options import read_guidance
from sampling.options import add_sampling_arguments
from sampling.samplers import SwitchingSampler
from sampling.solver_options import add_transport_arguments
from sampling.switching import ODE_METHODS, Switching, add_stage_arguments, build_switching, gmacs, read_stages

ROUNDS = 4  # each solves for ratios on the trajectories of the one before: these change a little with the models used
TOLERANCE = 0.005  # of the budget


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_transport_arguments(parser, positional_mode=True, ode_methods=ODE_METHODS)
    add_stage_arguments(parser)
    add_sampling_arguments(parser, ckpt=False)
    parser.add_argument("--budget-gmac", type=cli.positive_float, required=True, help="GMAC a network call, on average")
    parser.add_argument("--num-samples", type=cli.positive_int, default=16, help="images of each run")
    parser.add_argument("--batch-size", type=cli.positive_int, default=16, help="images at once")
    args = parser.parse_args(argv)
    if args.vae:
        parser.error("--vae: nothing is decoded here; leave it out")
    return args, read_stages(parser, args)


@dataclass(frozen=True)
class Trajectories:
    """What one run of N images and T solver steps showed.

    changes: (N, T - 1), the distance of neighbouring states over the reference, from the first that counts. calls: (T + 1,),
    network calls an image in each solver step and, last, in an SDE's last step. share: (stages,), of the calls.
    """

    changes: np.ndarray
    calls: np.ndarray
    share: np.ndarray


def share_of_calls(cost: np.ndarray, budget: float) -> np.ndarray:
    """The shares, (stages,), of highest entropy whose mean cost is the budget. Raises ValueError where none is."""
    if not cost.min() < budget < cost.max():
        raise ValueError(
            f"--budget-gmac {budget} is out of reach: a call costs {cost.min():.4g} with the cheapest model and "
            f"{cost.max():.4g} with the dearest; choose a value between"
        )

    def shares(slope: float) -> np.ndarray:
        weights = np.exp(slope * (cost - cost.max() if slope > 0 else cost - cost.min()))
        return weights / weights.sum()

    steepest = 700 / (cost.max() - cost.min())  # exp's range
    return shares(brentq(lambda slope: shares(slope) @ cost - budget, -steepest, steepest))


def calls_before(trajectories: Trajectories, ratio: float, first_several_num: int) -> float:
    """The share of an image's calls that come before it switches at this ratio, on average over the images."""
    below = trajectories.changes[:, first_several_num:] < ratio
    step = np.where(below.any(1), below.argmax(1) + first_several_num + 2, len(trajectories.calls))  # switch after this one
    return float((trajectories.calls.cumsum()[step - 1] / trajectories.calls.sum()).mean())


def ratio_for(trajectories: Trajectories, wanted: float, first_several_num: int) -> float:
    """The ratio at which :func:`calls_before` comes nearest to ``wanted``; it falls as the ratio grows."""
    candidates = np.unique(trajectories.changes[:, first_several_num:])
    middles = np.append((candidates[1:] + candidates[:-1]) / 2, 1.01 * candidates[-1])
    low, high = 0, len(middles) - 1
    while low < high:
        middle = (low + high) // 2
        if calls_before(trajectories, middles[middle], first_several_num) > wanted:
            low = middle + 1
        else:
            high = middle
    near = middles[max(high - 1, 0) : high + 1]
    return float(min(near, key=lambda ratio: abs(calls_before(trajectories, ratio, first_several_num) - wanted)))


class WatchedSampler(SwitchingSampler):
    """A switching sampler whose last dict also holds changes (B, T - 1), the distances of neighbouring states, and
    calls_by_step (B, steps), the evaluations in each step, of which a guided call is two."""

    def __call__(self, model, noise, y, step_noise) -> Iterator[dict[str, Tensor]]:
        network, previous, changes, calls = self.network, None, [], []
        distance = DISTANCES[network.tracker.policy.distance]
        for k, out in enumerate(super().__call__(model, noise, y, step_noise), start=1):
            calls.append(network.evaluations.sum(1))
            if previous is not None and k <= self.num_solver_steps:
                changes.append(distance(out["sample"] - previous).flatten(1).mean(1))
            previous = out["sample"].clone()
            if k == self.num_steps:
                by_step = torch.stack(calls, dim=1).diff(dim=1, prepend=torch.zeros(len(noise), 1, dtype=torch.long))
                out |= {"changes": torch.stack(changes, dim=1), "calls_by_step": by_step, "calls": network.evaluations}
            yield out


def record(args: Namespace, switching: Switching) -> Trajectories:
    """Sample the first images of ``--seed`` and watch; nobody looks at the images."""
    labels = label_source("random", switching.network.config.num_classes, args.seed, args.num_samples)
    batches = generate(
        switching.network,
        WatchedSampler(switching.sampler.inner, switching.network),
        PixelCodec(torch.device("cpu")),
        range(args.num_samples),
        labels=labels,
        seed=args.seed,
        guidance=read_guidance(args, switching.checkpoint.objective),
        batch_size=args.batch_size,
    )
    records = [batch.records for batch in batches]
    changes, by_step, calls = (
        torch.cat([entry[name] for entry in records]).double().numpy() for name in ("changes", "calls_by_step", "calls")
    )
    changes /= changes[:, : args.first_several_num].mean(1, keepdims=True)
    by_step = by_step[0]  # the same for all: only who is called differs
    if len(by_step) == switching.sampler.num_solver_steps:
        by_step = np.append(by_step, 0)
    return Trajectories(changes, by_step, calls.sum(0) / calls.sum())


def calibrate(args: Namespace, switching: Switching) -> tuple[tuple[float, ...], Trajectories]:
    """The ratios whose run came nearest to the budget, and that run."""
    cost, first = gmacs(switching.network), args.first_several_num
    if switching.sampler.num_solver_steps - 1 <= first:
        raise ValueError(
            f"--num-sampling-steps {args.num_sampling_steps} leaves no step to switch at after --first-several-num {first}"
        )
    wanted = np.cumsum(share_of_calls(cost, args.budget_gmac))[:-1]
    best = None
    trajectories = record(args, switching)  # with the policy it was built with, which never switches
    for _ in range(ROUNDS):
        ratios = tuple(ratio_for(trajectories, share, first) for share in wanted)
        policy = SwitchPolicy(ratios=ratios, first_several_num=first, distance=args.distance_func)
        switching.network.tracker = StageTracker(policy)
        trajectories = record(args, switching)
        error = abs(trajectories.share @ cost / args.budget_gmac - 1)
        if best is None or error < best[0]:
            best = error, ratios, trajectories
        if error < TOLERANCE:
            break
    return best[1:]


def main(argv: Sequence[str] | None = None) -> None:
    args, stages = parse(argv)
    never = (1e-30,) * (len(stages) - 1)
    policy = SwitchPolicy(ratios=never, first_several_num=args.first_several_num, distance=args.distance_func)
    state = start()
    if state.num_processes > 1:
        raise ValueError("sampling.calibrate_switch runs as one process: a few images suffice")
    switching = build_switching(args, stages, policy, state.device)
    ratios, run = calibrate(args, switching)
    cost = gmacs(switching.network)
    print(f"{'model':>7}{'GMAC a call':>13}{'share of calls':>16}")
    for i, (gmac, share) in enumerate(zip(cost, run.share, strict=True), start=1):
        print(f"{i:>7}{gmac:>13.4g}{share:>16.1%}")
    print(f"measured on {args.num_samples} images: {run.share @ cost:.4g} GMAC a call, wanted {args.budget_gmac:.4g}")
    if len(ratios) == 2:
        flags = f"--switch_ratio1 {ratios[0]:.4g} --switch_ratio2 {ratios[1]:.4g}"
    else:
        flags = " ".join(["--switch-ratios", *(f"{ratio:.4g}" for ratio in ratios)])
    print(f"{flags} --first_several_num {args.first_several_num} --distence_func {args.distance_func}")


if __name__ == "__main__":
    cli.run(main)
