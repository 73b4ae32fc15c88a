"""Train SiT, plain or with attention mediators, by flow matching.

    torchrun --nnodes=1 --nproc_per_node=4 attention_mediator/train.py --model SiT-S/2 --mediator_num 64 --image_size 256 \\
        --epochs 80 --global_batch_size 256 --data_path IMAGES --results_dir RUNS

From an image folder (the VAE encodes on the fly) or, faster, from a store of extract_features.py with --feature-path. The same
training as train_mask_adan.py with the mediator paper's recipe: AdamW, constant learning rate 1e-4.
"""

from collections.abc import Sequence

try:
    from runtime import cli
    from sampling.preview import grid_writer
    from training.evaluation import open_evaluation
    from training.options import add_training_arguments, parse_training_arguments
    from training.setup import train
except ModuleNotFoundError as error:
    if error.name not in ("runtime", "sampling", "training"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None

RECIPE = {
    "model": "SiT-XL/2",
    "optimizer": "adamw",
    "init_lr": 1e-4,
    "lr_decay_steps": 0,
    "epochs": 1400,
    "ckpt_every": 50_000,
    "cfg_scale": 4.0,
}


def create_parser(description: str) -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description)
    add_training_arguments(parser)
    parser.set_defaults(**RECIPE)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    train(parse_training_arguments(create_parser(__doc__.split("\n")[0]), argv), grid_writer, open_evaluation)


if __name__ == "__main__":
    cli.run(main)
