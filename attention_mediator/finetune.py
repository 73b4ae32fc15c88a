"""What train_256to512.py and train_512to1024.py share."""

from collections.abc import Sequence

from attention_mediator.train import create_parser
from sampling.preview import grid_writer
from training.evaluation import open_evaluation
from training.options import parse_training_arguments
from training.setup import train


def finetune(description: str, image_size: int, argv: Sequence[str] | None) -> None:
    """Train at ``image_size`` pixels from the checkpoint of a lower resolution."""
    parser = create_parser(description)
    parser.add_argument(
        "--resume-ckpt-low-resolution",
        metavar="CKPT",
        help="start from this checkpoint's EMA weights, resized; optimizer and epochs start afresh; a file, an URL or a hub id",
    )
    args = parse_training_arguments(parser, argv)
    if args.resume_ckpt_low_resolution and args.init_from:
        parser.error("--init-from takes a checkpoint of the same resolution; use one of them")
    args.image_size = args.image_size or image_size
    train(args, grid_writer, open_evaluation, needs_init=True)
