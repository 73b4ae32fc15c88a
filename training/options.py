"""The flags that all training scripts share."""

from diffusion.timesteps import SAMPLERS
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
from training.optim import OPTIMIZERS


def add_training_arguments(parser: ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--results-dir", default="results", help="each run makes a folder <index>-<model> in it")
    run.add_argument("--seed", type=seed, default=0, help="of weights, data order, timesteps, noise and masks")
    run.add_argument(
        "--resume", metavar="auto|PATH", help="continue: auto = the last run of this model in --results-dir, if any"
    )
    run.add_argument("--init-from", metavar="CKPT", help="start from a checkpoint's EMA weights, with a fresh optimizer")
    run.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network; weights stay fp32")
    run.add_argument("--compile", action=BooleanFlag, help="torch.compile the transformer blocks")

    length = parser.add_argument_group("length and batch")
    length.add_argument("--epochs", type=positive_float, default=81, help="passes over the data")
    length.add_argument("--max-steps", type=positive_int, help="stop after so many steps, whatever --epochs says")
    length.add_argument("--global-batch-size", type=positive_int, default=256, help="images a step, over all processes")
    length.add_argument(
        "--micro-batch-size",
        type=non_negative_int,
        default=0,
        help="images a process puts through the network at once, to save memory; 0 = its whole share; same gradients",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--optimizer", choices=OPTIMIZERS, default="adan", help="adan is timm's")
    recipe.add_argument(
        "--init-lr", type=positive_float, help="learning rate at step 0 (default: 5e-4 for EDT-XL/2, else 1e-3)"
    )
    recipe.add_argument("--final-lr", type=non_negative_float, default=5e-5, help="learning rate at --lr-decay-steps and after")
    recipe.add_argument("--lr-decay-steps", type=non_negative_int, default=400_000, help="0 = constant learning rate")
    recipe.add_argument("--weight-decay", type=non_negative_float, default=0.0)
    recipe.add_argument("--ema-decay", type=number(float, 0.0, 0.999999), default=0.9999)
    recipe.add_argument("--label-dropout", type=probability, default=0.1, help="probability of training without the label")
    recipe.add_argument("--timestep-sampler", choices=tuple(SAMPLERS), default="loss-second-moment")
    recipe.add_argument(
        "--min-snr-gamma", type=non_negative_float, default=5.0, help="weigh the error by min(SNR, gamma)/SNR; 0 = no weight"
    )

    reports = parser.add_argument_group("reports")
    reports.add_argument("--log-every", type=positive_int, default=100, metavar="STEPS")
    reports.add_argument("--ckpt-every", type=positive_int, default=10_000, metavar="STEPS", help="the last step is saved too")
    reports.add_argument("--keep-checkpoints", type=non_negative_int, default=3, help="the newest so many; 0 = all")
    reports.add_argument("--sample-every", type=non_negative_int, default=0, metavar="STEPS", help="a grid PNG; 0 = never")
    reports.add_argument("--sample-steps", type=positive_int, default=50, help="DDIM steps of that grid")
    reports.add_argument("--vae", help="decoder for --sample-every: a folder or hub id (default: what the store names)")
