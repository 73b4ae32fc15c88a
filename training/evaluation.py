"""``--eval-every``: samples of the average, measured against a reference by the evaluator's own code, in all processes."""

import contextlib
import copy
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from data.codec import Codec
from evaluations.batches import NEIGHBOUR, note_other_features, reference_shape
from evaluations.extraction import FeatureRows, Side, extract_batches, load_reference, note_small_set, side_of
from evaluations.features import INCEPTION, KINDS, Extractor, features_name, load_extractor
from evaluations.scores import Requests, compute, products_device
from models.inference import prepare
from runtime.cli import ArgumentParser, non_negative_float, non_negative_int, number, positive_int
from runtime.distributed import my_share, note, together, working_dtype
from sampling.generate import Guidance, LabelOf, generate, label_source
from sampling.guidance_options import published_power
from sampling.preview import run_codec, sampler_for
from sampling.samplers import Sampler
from training.autobatch import is_out_of_memory, release

GAUSSIAN_SOLVER, ODE_SOLVER = "dpm++2m", "ab2"  # what sample_ddp.py takes for the same samples, with --num-sampling-steps
LABELS = "random"  # the evaluator's protocol; functions of (seed, i), and so the same at every step
FEWEST_CALLS = 3  # of both solvers
OF_EVALUATIONS = (
    "eval_ref", "eval_samples", "eval_steps", "eval_cfg_scale", "eval_batch_size", "eval_features", "eval_cache",
    "inception_weights", "timm_weights",
)  # fmt: skip


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation of the average while training")
    group.add_argument(
        "--eval-every", type=non_negative_int, default=0, metavar="STEPS", help="and after the last step; 0 = never"
    )
    group.add_argument("--eval-ref", metavar="REF.npz", help="reference batch, of evaluations/reference.py or ADM's")
    group.add_argument(
        "--eval-samples",
        type=number(int, NEIGHBOUR + 1, 10**7),
        default=5000,
        help="images, over all processes; the same seed, labels and noise every time",
    )
    group.add_argument(
        "--eval-steps",
        type=number(int, FEWEST_CALLS, 1000),
        default=20,
        help="network calls a sample, of --solver dpm++2m or ab2",
    )
    group.add_argument("--eval-cfg-scale", type=non_negative_float, default=1.0, help="guidance; 1 = none, half the time")
    group.add_argument("--eval-batch-size", type=positive_int, default=64, help="images a process makes and measures at once")
    group.add_argument(
        "--eval-features", type=features_name, default="inception", help=f"as the evaluator's --features: {KINDS}"
    )
    group.add_argument("--eval-cache", metavar="DIR", help="keep the reference's features there, as the evaluator's --cache")
    group.add_argument("--inception-weights", metavar="FILE", help="of --eval-features, as the evaluator's")
    group.add_argument("--timm-weights", metavar="FILE", help="of --eval-features timm:NAME, as the evaluator's")


def check_evaluation_arguments(parser: ArgumentParser, args: Namespace) -> None:
    """A usage error for flags that do not go together."""
    if args.eval_every and not args.eval_ref:
        parser.error("--eval-every needs --eval-ref REF.npz to compare with: evaluations/reference.py makes one")
    for name in () if args.eval_every else OF_EVALUATIONS:
        value = getattr(args, name)
        if value != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} {value} does nothing without --eval-every STEPS: add that, or leave it out"
            )
    if args.fsdp and args.eval_every:
        parser.error(
            "--fsdp leaves no process with a whole model to draw samples from: leave --eval-every out, and measure samples of "
            "a checkpoint that python -m training.consolidate made one file of"
        )


class _LeaveError(Exception):
    """The process was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures so many samples of a network. All processes have one, and call it together.

    reference: on the main process, None on the others. labels: of image i. dtype: of the network in sampling. settings: what
    the metrics depend on besides the network, as it is logged.
    """

    sampler: Sampler
    codec: Codec
    extractor: Extractor
    reference: Side | None
    labels: LabelOf
    guidance: Guidance
    seed: int
    num_samples: int
    batch_size: int
    dtype: torch.dtype
    settings: dict[str, float | str]
    state: PartialState

    def __call__(self, average: nn.Module, leave: Callable[[], bool]) -> tuple[dict[str, float], dict[str, float | str]] | None:
        """The metrics by the evaluator's keys, on the main process, and the settings; on the others no metrics. None on all
        where any process is to leave: each asks itself at every network call, and the others after every batch. average: in
        eval mode, in float32; it stays as it is.

        Raises ValueError or OSError, on all processes, for what the features or the metrics cannot be, and where memory does
        not suffice.
        """
        with together(), _enough_memory():
            network = average if self.dtype == torch.float32 else prepare(copy.deepcopy(average), self.dtype)
        rows = self._rows(network, leave)
        gathered = rows and rows.gather(self.state)
        scores: dict[str, float] = {}
        with together(), _enough_memory():
            if gathered:
                samples = side_of("the evaluation's samples", *gathered)
                found, _ = compute(self.reference, samples, None, Requests(), products_device(self.state))
                scores = {name: value for name, value in found.items() if value is not None}
        return None if rows is None else (scores, self.settings)

    def _rows(self, network: nn.Module, leave: Callable[[], bool]) -> FeatureRows | None:
        """The features of this process's images; None, on all processes, where one is to leave.

        Batches are cut before they are shared out, so that the features do not depend on the number of processes. After each
        one the processes meet: none may go on to the gathering while another leaves or fails.
        """
        starts = range(0, self.num_samples, self.batch_size)
        mine = my_share(starts, self.state)
        image_ids = range(mine[0], min(mine[-1] + self.batch_size, self.num_samples)) if mine else range(0)
        rows = FeatureRows(len(image_ids))
        hidden = not self.state.is_main_process
        bar = tqdm(total=len(image_ids), desc="evaluating", unit=" images", disable=hidden, leave=False, file=sys.stderr)
        with bar, contextlib.closing(self._images(network, image_ids, leave)) as images:
            batches = extract_batches(images, image_ids, lambda i: f"sample {i}", self.extractor, bar)
            for _ in range(math.ceil(len(starts) / self.state.num_processes)):
                with together(), contextlib.suppress(_LeaveError), _enough_memory():
                    for layers, constant in islice(batches, 1):
                        rows.add(layers, constant)
                if any(gather_object([leave()])):
                    return None
        return rows

    def _images(self, network: nn.Module, image_ids: range, leave: Callable[[], bool]) -> Iterator[np.ndarray]:
        """Batches of images, uint8 (B, H, W, 3)."""

        def check() -> None:
            if leave():
                raise _LeaveError

        batches = generate(
            network,
            self.sampler,
            self.codec,
            image_ids,
            labels=self.labels,
            seed=self.seed,
            guidance=self.guidance,
            batch_size=self.batch_size,
            after_step=check,
        )
        with contextlib.closing(batches):
            for batch in batches:
                yield batch.images.numpy()


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Raises ValueError where a GPU's memory does not suffice, which no training need end for."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError("no memory is left beside the training: lower --eval-batch-size") from error


def open_evaluation(args: Namespace, config: dict, model: nn.Module, state: PartialState) -> Evaluation | None:
    """From the flags of :func:`add_evaluation_arguments`; None without ``--eval-every``. Called by all processes.

    config: what the run's checkpoints say of the model. model: one of its kind, to try with, left as it is. Raises ValueError
    for a codec, features or a reference that cannot be had or do not fit: what can go wrong later is to go wrong before the
    first step.
    """
    if not args.eval_every:
        return None
    with together():
        codec = run_codec(args, config)
        size = config["codec"]["image_size"]
        ref_shape = reference_shape(args.eval_ref)
        if ref_shape and ref_shape[1:3] != (size, size):
            raise ValueError(
                f"--eval-ref {args.eval_ref} holds images of {ref_shape[1]} x {ref_shape[2]} pixels, the run's have {size}: "
                f"make one with evaluations/reference.py --image-size {size}"
            )
        note_other_features(args.eval_ref, "--eval-features", args.eval_features)
        labels = label_source(LABELS, config["model_config"]["num_classes"], args.seed, args.eval_samples)
        sampler = fast_sampler(config["objective"], args.eval_steps)
    weights = {"inception_weights": args.inception_weights, "timm_weights": args.timm_weights}
    extractor = load_extractor(Namespace(features=args.eval_features, **weights), state)
    batch_size = args.eval_batch_size
    reference = load_reference(args.eval_ref, ref_shape[0] if ref_shape else 0, extractor, batch_size, state, args.eval_cache)
    evaluation = Evaluation(
        sampler=sampler,
        codec=codec,
        extractor=extractor,
        reference=reference,
        labels=labels,
        guidance=Guidance(args.eval_cfg_scale, power=published_power(config["objective"])),
        seed=args.seed,
        num_samples=args.eval_samples,
        batch_size=batch_size,
        dtype=working_dtype(args.precision),
        settings={
            "features": extractor.name,
            "ref": Path(args.eval_ref).name,
            "samples": args.eval_samples,
            "steps": args.eval_steps,
            "cfg_scale": args.eval_cfg_scale,
        },
        state=state,
    )
    with together(), _enough_memory():
        _try(replace(evaluation, sampler=fast_sampler(config["objective"], FEWEST_CALLS)), model, args)
    release(state.device)
    return evaluation


def _try(evaluation: Evaluation, model: nn.Module, args: Namespace) -> None:
    """Raises ValueError where a sample or its features cannot be had, or are others than the reference's."""
    network = prepare(copy.deepcopy(model).to(evaluation.state.device), evaluation.dtype)
    [image] = evaluation._images(network, range(1), lambda: False)  # (1, H, W, 3)
    pool = evaluation.extractor(image.repeat(min(args.eval_batch_size, args.eval_samples), axis=0)).pool
    if evaluation.reference is None:
        return
    held = len(evaluation.reference.statistics["pool"][0])
    if held != pool.shape[1]:
        raise ValueError(
            f"--eval-ref {args.eval_ref} carries statistics of {held} features, --eval-features "
            f"{args.eval_features} of {image.shape[1]}-pixel images has {pool.shape[1]}: make the reference with the same"
        )
    note_small_set("--eval-samples", args.eval_samples, held)
    if evaluation.extractor.name != INCEPTION:
        note(f"eval/fid is the Frechet distance of --eval-features {args.eval_features}: compare it only with its own")


def fast_sampler(objective: dict, num_calls: int) -> Sampler:
    """Of second order with one network call a step: for curves, where the last tenth of the distance does not matter."""
    return sampler_for(objective, (GAUSSIAN_SOLVER, num_calls), (ODE_SOLVER, num_calls))  # ab2's first step takes two calls
