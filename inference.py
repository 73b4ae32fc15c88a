"""Pictures of chosen classes from a checkpoint, as one labelled grid.

python inference.py --ckpt CKPT --classes 207,360 --per-class 4 --cfg-scale 4 --amm True --out pictures.png
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime import cli
from runtime.distributed import start
from runtime.files import check_writable
from sampling.generate import generate
from sampling.grids import save_grid
from sampling.options import Pipeline, add_sampling_arguments, build_pipeline
from sampling.solver_options import add_transport_arguments


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_sampling_arguments(parser)
    add_transport_arguments(parser)
    parser.add_argument("--classes", help="labels, as 207,360 (default: the first ten)")
    parser.add_argument("--per-class", type=cli.positive_int, default=4, help="pictures of each class")
    parser.add_argument("--batch-size", type=cli.positive_int, default=16)
    parser.add_argument("--out", default="samples.png", help="the grid; rows are classes")
    parser.add_argument(
        "--trajectory",
        type=cli.positive_int,
        nargs="?",
        const=8,
        metavar="COLUMNS",
        help="also write <out>-trajectory.png: a row a class, the predicted picture at so many steps (8 if no number follows)",
    )
    return parser.parse_args(argv)


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """ "207,360" -> [207, 360]; None -> the first ten. Raises ValueError for a label the model does not have."""
    if text is None:
        return list(range(min(num_classes, 10)))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--classes {text}: write labels with commas between, for example 207,360") from None
    outside = [label for label in classes if not 0 <= label < num_classes]
    if outside:
        raise ValueError(f"--classes {text}: label {outside[0]} does not exist, the model has classes 0 to {num_classes - 1}")
    return classes


def class_title(pipeline: Pipeline, label: int) -> str:
    names = pipeline.checkpoint.class_names
    return names[label] if label < len(names) else str(label)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    if state.num_processes > 1:
        raise ValueError("inference.py runs as one process; sample_ddp.py uses many")
    check_writable(args.out)
    pipeline = build_pipeline(args, state.device)
    classes = parse_classes(args.classes, pipeline.num_classes)
    labels = [label for label in classes for _ in range(args.per_class)]
    images, previews = [], []
    batches = generate(
        pipeline.model,
        pipeline.sampler,
        pipeline.codec,
        range(len(labels)),
        labels=labels.__getitem__,
        seed=args.seed,
        guidance=pipeline.guidance,
        batch_size=args.batch_size,
        pad_last=args.compile and len(labels) > args.batch_size,
        num_previews=min(args.trajectory or 0, pipeline.sampler.num_steps),
    )
    for batch in tqdm(batches, total=-(-len(labels) // args.batch_size), unit="batch", desc="sampling"):
        images.append(batch.images)
        if batch.previews:
            previews.append(torch.stack(batch.previews, dim=1))  # (B, steps, H, W, 3)
    titles = [class_title(pipeline, label) for label in classes]
    save_grid(torch.cat(images).numpy(), args.out, args.per_class, titles)
    print(f"{args.out}: {len(classes)} classes, {args.per_class} pictures each")
    if previews:
        strips = torch.cat(previews)[:: args.per_class].numpy()  # the first picture of every class
        path = Path(args.out).with_stem(Path(args.out).stem + "-trajectory")
        save_grid(np.concatenate(strips), path, strips.shape[1], titles)
        print(f"{path}: the prediction of the finished picture at {strips.shape[1]} of {pipeline.sampler.num_steps} steps")


if __name__ == "__main__":
    cli.run(main)
