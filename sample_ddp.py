"""Sample many images from a checkpoint with any number of processes: a PNG folder and a .npz for the evaluator.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt CKPT --amm True --num-fid-samples 50000 --sample-dir SAMPLES

Image i depends on --seed and i alone: not on the number of processes, the batch size or a restart. Started again on the same
folder, it makes what is missing.
"""

from collections.abc import Sequence

from runtime import cli
from runtime.distributed import start
from sampling.many import add_many_arguments, sample_many
from sampling.options import add_sampling_arguments, build_pipeline
from sampling.solver_options import add_transport_arguments


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_sampling_arguments(parser)
    add_many_arguments(parser)
    add_transport_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    pipeline = build_pipeline(args, state.device)
    folder = sample_many(args, pipeline, state)
    if folder:
        amm = pipeline.settings["amm"]
        print(f"{folder.npz_path}: {args.num_fid_samples} images, AMM {amm}, guidance {args.cfg_scale}")


if __name__ == "__main__":
    cli.run(main)
