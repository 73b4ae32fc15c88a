"""``--eval-every``: samples of the average, measured against a reference by the evaluator's own code, in all processes."""

import contextlib
import copy
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from data.codec import Codec
from diffusion.transport import ODE, create_transport
from evaluations.batches import NEIGHBOUR, reference_shape
from evaluations.extraction import FeatureRows, Side, extract_batches, load_reference, note_small_set, side_of
from evaluations.features import INCEPTION, KINDS, Extractor, features_name, load_extractor
from evaluations.scores import Requests, compute
from models.inference import prepare
from runtime.cli import ArgumentParser, non_negative_float, non_negative_int, number, positive_int
from runtime.distributed import my_share, note, together, working_dtype
from sampling.generate import Guidance, LabelOf, generate, label_source
from sampling.guidance_options import published_power
from sampling.preview import run_codec
from sampling.samplers import Sampler, TransportSampler, gaussian_sampler, transport_settings

GAUSSIAN_SOLVER, ODE_SOLVER = "dpm++2m", "ab2"  # what sample_ddp.py takes for the same samples, with --num-sampling-steps
LABELS = "random"  # the evaluator's protocol; functions of (seed, i), and so the same at every step


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
        "--eval-steps", type=number(int, 2, 1000), default=20, help="network calls a sample, of --solver dpm++2m or ab2"
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
    if args.eval_ref and not args.eval_every:
        parser.error(f"--eval-ref {args.eval_ref}: nothing is compared with it without --eval-every STEPS: add that")
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

    reference: on the main process, None on the others. labels: of image i. dtype: of the network in sampling.
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
    state: PartialState

    @property
    def features(self) -> str:
        return self.extractor.name

    def __call__(self, average: nn.Module, leave: Callable[[], bool]) -> dict[str, float] | None:
        """The metrics by the evaluator's keys, on the main process; empty on the others. None on all where any process is to
        leave, which is asked at every network call. average: in eval mode, in float32; it stays as it is.

        Raises ValueError, on all processes, for what the features or the metrics cannot be.
        """
        network = average if self.dtype == torch.float32 else prepare(copy.deepcopy(average), self.dtype)
        rows = self._rows(network, leave)
        gathered = rows and rows.gather(self.state)
        scores: dict[str, float] = {}
        with together():
            if gathered:
                device = self.state.device if self.state.device.type == "cuda" else torch.device("cpu")  # MPS has no float64
                samples = side_of("the evaluation's samples", *gathered)
                found, _ = compute(self.reference, samples, None, Requests(), device)
                scores = {name: value for name, value in found.items() if value is not None}
        return None if rows is None else scores

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
                with together(), contextlib.suppress(_LeaveError):
                    for layers, constant in islice(batches, 1):
                        rows.add(layers, constant)
                if any(gather_object([leave()])):
                    return None
        return rows

    def _images(self, network: nn.Module, image_ids: range, leave: Callable[[], bool]):
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


def open_evaluation(args: Namespace, config: dict, state: PartialState) -> Evaluation | None:
    """From the flags of :func:`add_evaluation_arguments`; None without ``--eval-every``. Called by all processes.

    config: what the run's checkpoints say of the model. Raises ValueError for a codec, features or a reference that cannot be
    had or do not fit: what can go wrong later is to go wrong before the first step.
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
        labels = label_source(LABELS, config["model_config"]["num_classes"], args.seed, args.eval_samples)
        sampler = fast_sampler(config["objective"], args.eval_steps)
    weights = {"inception_weights": args.inception_weights, "timm_weights": args.timm_weights}
    extractor = load_extractor(Namespace(features=args.eval_features, **weights), state)
    batch_size = args.eval_batch_size
    reference = load_reference(args.eval_ref, ref_shape[0] if ref_shape else 0, extractor, batch_size, state, args.eval_cache)
    with together():
        _try(extractor, reference, size, args)
    return Evaluation(
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
        state=state,
    )


def _try(extractor: Extractor, reference: Side | None, size: int, args: Namespace) -> None:
    """Raises ValueError where the features of images of that size cannot be had, or are others than the reference's."""
    blank = np.zeros((min(args.eval_batch_size, args.eval_samples), size, size, 3), np.uint8)
    pool = extractor(blank).pool
    if reference is None:
        return
    held = len(reference.statistics["pool"][0])
    if held != pool.shape[1]:
        raise ValueError(
            f"--eval-ref {args.eval_ref} carries statistics of {held} features, --eval-features "
            f"{args.eval_features} of {size}-pixel images has {pool.shape[1]}: make the reference with the same"
        )
    note_small_set("--eval-samples", args.eval_samples, held)
    if extractor.name != INCEPTION:
        note(f"eval/fid is the Frechet distance of --eval-features {args.eval_features}: compare it only with its own")


def fast_sampler(objective: dict, num_calls: int) -> Sampler:
    """Of second order with one network call a step: for curves, where the last tenth of the distance does not matter."""
    if objective["name"] == "gaussian":
        return gaussian_sampler(GAUSSIAN_SOLVER, num_calls)
    transport = create_transport(**transport_settings(objective))
    return TransportSampler(
        ODE(transport, ODE_SOLVER, num_calls)
    )  # of num_calls points in time; its first step takes two calls
