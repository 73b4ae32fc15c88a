"""The flags that all training scripts share."""

import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence

from models import model_names
from runtime.cli import (
    ArgumentParser,
    BooleanFlag,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    probability,
    seed,
)
from runtime.redact import redact
from runtime.stopping import duration
from training.evaluation import add_evaluation_arguments, check_evaluation_arguments
from training.objective import add_objective_arguments, resolve_objective
from training.optim import OPTIMIZERS
from training.profiles import sigma_rels


def time_limit(text: str) -> float:
    """An argparse type: seconds."""
    try:
        return duration(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def micro_batch_size(text: str) -> int | str:
    """An argparse type: a number, or "auto"."""
    return text if text == "auto" else non_negative_int(text)


def add_training_arguments(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=model_names(), default="EDT-S/2")
    model.add_argument(
        "--mediator-num", type=positive_int, help="SiT only: attention through so many mediator tokens, a square"
    )
    model.add_argument("--mediator-layers", type=positive_int, help="how many of the first blocks have them (default: all)")
    model.add_argument("--decode-layer", type=positive_int, help="MDTv2 only: how many of the blocks decode (default: 4)")
    _add_data_arguments(parser)
    _add_run_arguments(parser)
    _add_recipe_arguments(parser)
    add_objective_arguments(parser)
    _add_report_arguments(parser)
    add_evaluation_arguments(parser)


def _add_run_arguments(parser: ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--results-dir", default="results", help="each run makes a folder <index>-<model> in it")
    run.add_argument("--seed", "--global-seed", type=seed, default=0, help="of weights, data order, timesteps, noise and masks")
    run.add_argument(
        "--resume",
        "--ckpt",
        metavar="auto|PATH",
        help="continue a run, by its folder or a checkpoint: auto = the last run of this model in --results-dir, if any",
    )
    run.add_argument(
        "--allow-changed", action=BooleanFlag, help="resume although flags or data that shape the result are others"
    )
    run.add_argument(
        "--time-limit",
        type=time_limit,
        metavar="TIME",
        help="save and exit 0 after it, as upon SIGTERM, SIGINT or SIGUSR1: MINUTES, MM:SS, HH:MM:SS or D-HH:MM:SS",
    )
    run.add_argument(
        "--init-from", metavar="CKPT", help="start from the EMA weights of a checkpoint (file, URL, hub id); fresh optimizer"
    )
    run.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network; weights stay fp32")
    run.add_argument("--compile", action=BooleanFlag, help="torch.compile the transformer blocks, and on a CPU Adan's step")
    run.add_argument(
        "--gradient-checkpointing",
        action=BooleanFlag,
        help="compute the transformer blocks again in backward, to save memory; same gradients",
    )
    run.add_argument(
        "--fsdp",
        action=BooleanFlag,
        help="under torchrun: each process holds a part of weights, average, gradients and optimizer state, for models that "
        "fit no single GPU; a checkpoint is then a folder, of which python -m training.consolidate makes a .pt",
    )

    length = parser.add_argument_group("length and batch")
    length.add_argument("--epochs", type=positive_float, default=81, help="passes over the data")
    length.add_argument("--max-steps", type=positive_int, help="stop after so many steps, whatever --epochs says")
    length.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step, over all processes")
    length.add_argument(
        "--micro-batch-size",
        type=micro_batch_size,
        default=0,
        metavar="auto|IMAGES",
        help="images a process puts through the network at once, to save memory; 0 = its whole share; auto = as many as a CUDA "
        "GPU's memory takes beside the step (not beside images being encoded, --sample-every or --eval-every); same gradients",
    )


def _add_recipe_arguments(parser: ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, default="adan", help="adan is timm's")
    rate = number(float, 0.0, 1000.0)  # far beyond it floats overflow
    recipe.add_argument("--init-lr", "--lr", type=number(float, 0.0, 1000.0, exclusive=True), help="learning rate at step 0")
    recipe.add_argument("--final-lr", type=rate, default=5e-5, help="learning rate at --lr-decay-steps and after")
    recipe.add_argument("--lr-decay-steps", type=non_negative_int, default=400_000, help="0 = constant learning rate")
    recipe.add_argument("--weight-decay", type=rate, default=0.0)
    recipe.add_argument("--grad-clip", type=non_negative_float, default=0.0, help="largest norm of the gradient; 0 = any")
    recipe.add_argument(
        "--max-skipped-steps",
        type=positive_int,
        default=20,
        help="steps whose loss or gradient is not finite change nothing; after so many in a row the run stops",
    )
    recipe.add_argument("--ema-decay", type=number(float, 0.0, 0.999999), default=0.9999)
    recipe.add_argument(
        "--ema-profiles",
        type=sigma_rels,
        metavar="LENGTH[,LENGTH...]",
        help="also keep power-function averages of these lengths, as shares of the training (0.05,0.10), and store snapshots "
        "of them, from which python -m training.posthoc_ema makes an average of any length (docs/posthoc_ema.md)",
    )
    recipe.add_argument(
        "--ema-profile-every", type=positive_int, metavar="STEPS", help="between these snapshots (default: a checkpoint's)"
    )
    recipe.add_argument("--label-dropout", type=probability, default=0.1, help="probability of training without the label")
    recipe.add_argument("--masked", action=BooleanFlag, help="also predict from masked tokens in every step (EDT, MDTv2)")


def _add_data_arguments(parser: ArgumentParser) -> None:
    data = parser.add_argument_group("data: one of the first three")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--feature-path", help="latent store of extract_features.py, or the published layout")
    source.add_argument(
        "--data-path", help="image folder with one sub-folder per class; encoded on the fly, mirrored at random"
    )
    source.add_argument("--dummy", action=BooleanFlag, help="random latents, to measure speed")
    data.add_argument("--image-size", type=positive_int, help="pixels (default: a store's own, else 256); a store's is checked")
    data.add_argument("--num-classes", type=positive_int, help="default: what the data say; 1000 for --dummy")
    data.add_argument("--num-workers", type=non_negative_int, default=4, help="threads that read images for --data-path")
    data.add_argument(
        "--vae",
        help="of --data-path, --sample-every and --eval-every: a folder, hub id, sd-vae-ft-ema, -mse or pixels "
        "(default: what a store names, else sd-vae-ft-ema)",
    )


def _add_report_arguments(parser: ArgumentParser) -> None:
    reports = parser.add_argument_group("reports")
    reports.add_argument("--log-every", type=positive_int, default=100, metavar="STEPS")
    reports.add_argument("--ckpt-every", type=positive_int, default=10_000, metavar="STEPS", help="the last step is saved too")
    reports.add_argument("--epoch-ckpt-every", type=positive_float, metavar="EPOCHS", help="in place of --ckpt-every")
    reports.add_argument("--keep-checkpoints", type=non_negative_int, default=3, help="the newest so many; 0 = all")
    reports.add_argument("--sample-every", type=non_negative_int, default=0, metavar="STEPS", help="a grid PNG; 0 = never")
    reports.add_argument("--sample-steps", type=positive_int, default=50, help="DDIM or Heun steps of that grid")
    reports.add_argument("--cfg-scale", type=non_negative_float, default=1.0, help="guidance of that grid; 1 = none")
    reports.add_argument("--wandb", action=BooleanFlag, help="log to Weights & Biases too; WANDB_MODE=offline keeps it local")
    reports.add_argument("--wandb-project", help="default: efficient-diffusion-transformers")
    reports.add_argument("--wandb-entity", help="user or team (default: the key's)")
    reports.add_argument("--wandb-name", help="of the run (default: the results folder's)")
    reports.add_argument("--wandb-key", help="better: the variable WANDB_API_KEY, or wandb login; never stored or logged")


def parse_training_arguments(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse, and refuse what does not go together. The W&B key goes into this process's environment and nowhere else."""
    args = parser.parse_args(argv)
    if args.resume not in (None, "auto") and args.init_from:
        parser.error("--resume continues a run, --init-from starts a new one: use one of them, or --resume auto with it")
    if args.dummy is False and not (args.feature_path or args.data_path):
        parser.error("--no-dummy names no data: give --feature-path or --data-path")
    if args.fsdp and args.sample_every:
        parser.error(
            "--fsdp leaves no process with a whole model to draw samples from: leave --sample-every out, and sample a "
            "checkpoint that python -m training.consolidate made one file of"
        )
    if args.ema_profile_every and not args.ema_profiles:
        parser.error(f"--ema-profile-every {args.ema_profile_every} stores averages of --ema-profiles: add it, as 0.05,0.10")
    if args.fsdp and args.ema_profiles:
        parser.error("--fsdp leaves no process with a whole model to average: leave --ema-profiles out")
    check_evaluation_arguments(parser, args)
    if args.fsdp and args.precision == "fp16":
        parser.error("--fsdp has no loss scaling: use --precision bf16 or fp32")
    if args.fsdp and args.micro_batch_size == "auto":
        parser.error(
            "--micro-batch-size auto tries a whole model in one process, which --fsdp is there to avoid: give a number"
        )
    resolve_objective(parser, args)
    if args.wandb_key:
        os.environ["WANDB_API_KEY"] = args.wandb_key
    if args.wandb:
        sys.argv = _without_secrets(sys.argv)  # W&B records the command line
    del args.wandb_key
    return args


def _without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with every value of --wandb-key, in either form, replaced, and nothing secret in URLs."""
    hidden, follows = [], False
    for arg in argv:
        name, equals, _ = arg.partition("=")
        is_key = name.replace("_", "-") == "--wandb-key"
        hidden.append("***" if follows else f"{name}=***" if is_key and equals else redact(arg))
        follows = is_key and not equals
    return hidden
