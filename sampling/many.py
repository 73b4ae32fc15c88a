"""What the scripts that sample many images share: their flags, and the run from a pipeline to a folder."""

import time
from argparse import Namespace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from runtime.cli import ArgumentParser, BooleanFlag, positive_int
from runtime.distributed import my_share, together
from runtime.files import file_sha256
from sampling.generate import LABEL_RULES, generate, label_source
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
    with together():
        if state.is_main_process:
            folder.prepare()
    state.wait_for_everyone()
    missing = folder.missing()
    state.wait_for_everyone()  # nobody writes before everybody has seen the same list
    mine = my_share(missing, state)
    batches = generate(
        pipeline.model,
        pipeline.sampler,
        pipeline.codec,
        mine,
        labels=labels,
        seed=args.seed,
        guidance=pipeline.guidance,
        batch_size=args.per_proc_batch_size,
        autocast_dtype=pipeline.autocast_dtype,
    )
    with folder, tqdm(total=len(mine), unit="image", disable=not state.is_main_process, desc="sampling") as bar:
        for batch in batches:
            folder.write(batch)
            bar.update(len(batch.image_ids))
    if not state.is_main_process:
        return None
    # No barrier: the slowest process may lag by more than its timeout. If one fails, the launcher ends this one too.
    while not folder.complete():
        time.sleep(POLL_SECONDS)
    folder.finish(np.array([labels(i) for i in range(args.num_fid_samples)]))
    return folder
