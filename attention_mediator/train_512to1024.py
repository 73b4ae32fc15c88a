"""Go on from a checkpoint of 512-pixel images to training on 1024 pixels.

    torchrun --nnodes=1 --nproc_per_node=4 attention_mediator/train_512to1024.py --model SiT-S/2 \\
        --mediator_num 64 --image_size 1024 --epochs 5 --global_batch_size 16 --data_path IMAGES --results_dir RUNS \\
        --resume_ckpt_low_resolution CKPT
"""

from collections.abc import Sequence

try:
    from attention_mediator.finetune import finetune
    from runtime import cli
except ModuleNotFoundError as error:
    if error.name not in ("attention_mediator", "runtime"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


def main(argv: Sequence[str] | None = None) -> None:
    finetune(__doc__.split("\n")[0], 1024, argv)


if __name__ == "__main__":
    cli.run(main)
