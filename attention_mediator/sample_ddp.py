"""Sample many images from a SiT checkpoint by its SDE or ODE, with any number of processes.

    torchrun --nnodes=1 --nproc_per_node=4 attention_mediator/sample_ddp.py SDE --model SiT-S/2 --mediator_num 64 \\
        --num_fid_samples 50_000 --image_size 256 --cfg_scale 1.0 --sample_dir SAMPLES --ckpt CKPT

The same as sample_ddp.py at the root, with the mediator system's command line, and --likelihood.
"""

from collections.abc import Sequence

import numpy as np

try:
    from runtime import cli
    from runtime.distributed import start
    from sampling.many import add_many_arguments, sample_many
    from sampling.options import add_sampling_arguments, build_pipeline, check_held
    from sampling.solver_options import add_transport_arguments
    from sampling.writers import Table
except ModuleNotFoundError as error:
    if error.name not in ("runtime", "sampling"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_transport_arguments(parser, positional_mode=True)
    add_sampling_arguments(parser)
    add_many_arguments(parser)
    parser.add_argument("--image-size", type=cli.positive_int, help="pixels; checked against the checkpoint")
    parser.add_argument("--mediator-num", type=cli.positive_int, help="checked against the checkpoint")
    parser.add_argument(
        "--likelihood", action=cli.BooleanFlag, help="ODE: write log_likelihood.csv, the log-density of each image's latents"
    )
    args = parser.parse_args(argv)
    if args.likelihood and args.mode != "ODE":
        parser.error("--likelihood follows the ODE: use the mode ODE")
    if args.likelihood and args.cfg_scale != 1:
        parser.error(f"--likelihood is that of the unguided model: --cfg-scale must be 1, got {args.cfg_scale}")
    return args


def likelihood_table(num_dimensions: int) -> Table:
    """nats: log-density of the latents; bits_per_dim: -nats / (dimensions * ln 2)."""

    def rows(batch):
        nats = batch.records["log_likelihood"].double().numpy()
        return np.stack([nats, -nats / (num_dimensions * np.log(2))], axis=1)

    return Table("log_likelihood.csv", ("nats", "bits_per_dim"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    pipeline = build_pipeline(args, state.device)
    config = pipeline.checkpoint.config
    check_held("--image-size", args.image_size, pipeline.image_size, args.ckpt)
    check_held("--mediator-num", args.mediator_num, getattr(config, "mediator_num", None), args.ckpt)
    table = likelihood_table(config.in_channels * config.input_size**2) if args.likelihood else None
    folder = sample_many(args, pipeline, state, table)
    if folder:
        print(f"{folder.npz_path}: {args.num_fid_samples} images, {args.mode}, guidance {args.cfg_scale}")
        if table:
            print(f"{folder.folder / table.name}: mean {folder.read_table()[:, 1].mean():.4f} bits per latent dimension")


if __name__ == "__main__":
    cli.run(main)
