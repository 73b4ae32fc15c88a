"""Train EDT, or a network to compare it with, by the same recipe: masked, with Adan, min-SNR-5 and loss-aware timesteps.

    accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 --feature-path FEATURES
    torchrun --nproc_per_node=8 train_mask_adan.py ...    python train_mask_adan.py ...

Make FEATURES with extract_features.py. Everything drawn in step s is a function of (seed, s), so a resumed run equals an
uninterrupted one and a run on 8 GPUs equals one on 1 up to the order of floating-point sums.
"""

from collections.abc import Sequence

from models.registry import model_config
from runtime import cli
from sampling.preview import grid_writer
from training.evaluation import open_evaluation
from training.options import add_training_arguments, parse_training_arguments
from training.setup import train

XL_LR, LR = 5e-4, 1e-3  # the EDT paper's


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_training_arguments(parser)
    parser.set_defaults(masked=None)
    args = parse_training_arguments(parser, argv)
    if args.masked is None:
        args.masked = hasattr(model_config(args.model), "mask_places")
    args.init_lr = args.init_lr or (XL_LR if "-XL/" in args.model else LR)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    train(parse(argv), grid_writer, open_evaluation)


if __name__ == "__main__":
    cli.run(main)
