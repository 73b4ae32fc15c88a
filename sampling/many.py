"""What the scripts that sample many images share: their flags, and the run from a pipeline to a folder."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from runtime.ahead import WriteBehind
from runtime.cli import ArgumentParser, BooleanFlag, positive_int
from runtime.distributed import my_share, together
from runtime.files import SharedRows, batches_to_do, file_sha256
from runtime.locks import folder_lock
from sampling.generate import LABEL_RULES, Batch, generate, label_source
from sampling.options import Pipeline
from sampling.writers import SampleFolder, Table

POLL_SECONDS = 1.0


def add_many_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--sample-dir", default="samples", help="folder of the samples; one folder for each setting")
    parser.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="how many images")
    parser.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images a process makes at once")
    parser.add_argument("--labels", default="random", help="random (as published), balanced, or a file with one label an image")
    parser.add_argument("--png", action=BooleanFlag, default=True, help="write PNGs beside the .npz")


def sample_many(args: Namespace, pipeline: Pipeline, state: PartialState, table: Table | None = None) -> SampleFolder | None:
    """Make every image that is missing in ``--sample-dir``, this process its share. Returns the finished folder on the main
    process, None elsewhere. Raises ValueError for labels or a folder that do not fit."""
    labels = label_source(args.labels, pipeline.num_classes, args.seed, args.num_fid_samples)
    settings = {
        **pipeline.settings,
        "seed": args.seed,
        "labels": args.labels if args.labels in LABEL_RULES else f"sha256 {file_sha256(args.labels)}",
        "png": args.png,
        "num_fid_samples": args.num_fid_samples,
    }
    path = Path(args.sample_dir)
    folder = SampleFolder(path, args.num_fid_samples, pipeline.image_size, settings, png=args.png, table=table)
    with contextlib.ExitStack() as held:
        with together():
            if state.is_main_process and not folder.packed():
                held.enter_context(folder_lock(path))
                folder.prepare()
        state.wait_for_everyone()
        progress = folder.progress()
        state.wait_for_everyone()  # nobody writes before everybody has seen the same list
        share = my_share(batches_to_do(progress, args.per_proc_batch_size), state)
        if share:  # without one, the main process may have packed the files, and removed them, before they are opened here
            _make(args, pipeline, folder, share, labels, progress == SharedRows.MISSING, show=state.is_main_process)
        if not state.is_main_process:
            return None
        # No barrier: the slowest process may lag by more than its timeout. If one fails, all end (runtime.watch).
        while not folder.complete():
            time.sleep(POLL_SECONDS)
        folder.finish(np.array([labels(i) for i in range(args.num_fid_samples)]))
    return folder


def _make(
    args: Namespace,
    pipeline: Pipeline,
    folder: SampleFolder,
    share: Sequence[list[int]],
    labels: Callable[[int], int],
    missing: np.ndarray,
    *,
    show: bool,
) -> None:
    """Make the batches of ``share``, all of the same size but for the last of all, and write what is ``missing``."""
    image_ids = [image_id for batch in share for image_id in batch]
    with folder, tqdm(total=len(image_ids), unit="image", disable=not show, desc="sampling") as bar:

        def write(batch: Batch) -> None:
            folder.write(batch.wait(), missing)
            bar.update(len(batch.image_ids))

        with WriteBehind(write) as behind:
            batches = generate(
                pipeline.model,
                pipeline.sampler,
                pipeline.codec,
                image_ids,
                labels=labels,
                seed=args.seed,
                guidance=pipeline.guidance,
                batch_size=args.per_proc_batch_size,
                pad_last=args.compile,
                wait=False,
                after_step=behind.check,
            )
            with contextlib.closing(batches):
                for batch in batches:
                    behind.put(batch)
