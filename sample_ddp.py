"""Sample many images from a checkpoint with any number of processes: a PNG folder and a .npz for the evaluator.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt CKPT --amm True --num-fid-samples 50000 --sample-dir SAMPLES

Image i depends on --seed and i alone: not on the number of processes, the batch size or a restart. Started again on the same
folder, it makes what is missing.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime import cli
from runtime.distributed import my_share, start
from runtime.files import file_sha256
from sampling.generate import LABEL_RULES, generate, label_source
from sampling.options import Pipeline, add_sampling_arguments, build_pipeline
from sampling.writers import SampleFolder

POLL_SECONDS = 1.0


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_sampling_arguments(parser)
    parser.add_argument("--sample-dir", default="samples", help="folder of the samples; one folder for each setting")
    parser.add_argument("--num-fid-samples", type=cli.positive_int, default=50_000, help="how many images")
    parser.add_argument("--per-proc-batch-size", type=cli.positive_int, default=32, help="images a process makes at once")
    parser.add_argument("--labels", default="random", help="random (as published), balanced, or a file with one label an image")
    parser.add_argument("--png", action=cli.BooleanFlag, default=True, help="write PNGs beside the .npz")
    return parser.parse_args(argv)


def settings_of(args, pipeline: Pipeline) -> dict:
    """Everything the images depend on."""
    return {
        "checkpoint_sha256": file_sha256(args.ckpt),
        "weights": args.weights,
        "codec": pipeline.codec.name,
        "amm": str(pipeline.amm or "off"),
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "num_sampling_steps": args.num_sampling_steps,
        "ddim": args.ddim,
        "seed": args.seed,
        "precision": args.precision,
        "labels": args.labels if args.labels in LABEL_RULES else f"sha256 {file_sha256(args.labels)}",
        "png": args.png,
        "num_fid_samples": args.num_fid_samples,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    pipeline = build_pipeline(args, state.device)
    labels = label_source(args.labels, pipeline.num_classes, args.seed, args.num_fid_samples)
    folder = SampleFolder(
        Path(args.sample_dir), args.num_fid_samples, pipeline.image_size, settings_of(args, pipeline), png=args.png
    )
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
            for image_id, image in zip(batch.image_ids, batch.images.numpy(), strict=True):
                folder.write(image_id, image)
            bar.update(len(batch.image_ids))
    if state.is_main_process:
        # No barrier: the slowest process may lag by more than its timeout. If one fails, the launcher ends this one too.
        while not folder.complete():
            time.sleep(POLL_SECONDS)
        path = folder.finish(np.array([labels(i) for i in range(args.num_fid_samples)]))
        print(f"{path}: {args.num_fid_samples} images, AMM {pipeline.amm or 'off'}, guidance {args.cfg_scale}")


if __name__ == "__main__":
    cli.run(main)
