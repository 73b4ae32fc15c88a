"""Sample many images while switching, image by image, between models with growing numbers of mediators.

    torchrun --nnodes=1 --nproc_per_node=4 time_step_wise_adjusting/sample_ddp_three.py SDE --model SiT-S/2 \\
        --num_fid_samples 50_000 --image_size 256 --first_several_num 3 --distence_func mae --sample_dir SAMPLES \\
        --mediator_num1 4 --mediator_num2 16 --mediator_num3 64 --ckpt1 CKPT4 --ckpt2 CKPT16 --ckpt3 CKPT64 \\
        --switch_ratio1 0.3 --switch_ratio2 0.1

Any batch size: every image switches by itself. Any number of models: --ckpts A B ... --switch-ratios R ...
SAMPLES/switch_steps.csv says when each image switched and what it cost; python -m sampling.calibrate_switch proposes ratios.
"""

from collections.abc import Sequence

try:
    from models.stepwise import SwitchPolicy
    from runtime import cli
    from runtime.distributed import start
    from sampling.many import add_many_arguments, sample_many
    from sampling.options import add_sampling_arguments, check_held
    from sampling.solver_options import add_transport_arguments
    from sampling.switching import (
        ODE_METHODS,
        add_ratio_arguments,
        add_stage_arguments,
        read_ratios,
        read_stages,
        summary,
        switch_table,
        switching_pipeline,
    )
except ModuleNotFoundError as error:
    if error.name not in ("models", "runtime", "sampling"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add_transport_arguments(parser, positional_mode=True, ode_methods=ODE_METHODS)
    add_stage_arguments(parser)
    add_ratio_arguments(parser)
    add_sampling_arguments(parser, ckpt=False)
    add_many_arguments(parser)
    parser.add_argument("--image-size", type=cli.positive_int, help="pixels; checked against the checkpoints")
    args = parser.parse_args(argv)
    stages = read_stages(parser, args)
    return args, stages, read_ratios(parser, args, len(stages))


def main(argv: Sequence[str] | None = None) -> None:
    args, stages, ratios = parse(argv)
    policy = SwitchPolicy(ratios=ratios, first_several_num=args.first_several_num, distance=args.distance_func)
    state = start()
    pipeline = switching_pipeline(args, stages, policy, state.device)
    check_held("--image-size", args.image_size, pipeline.image_size, stages[0].path)
    table = switch_table(pipeline.model)
    folder = sample_many(args, pipeline, state, table)
    if folder:
        print(f"{folder.npz_path}: {args.num_fid_samples} images, {args.mode}, guidance {args.cfg_scale}")
        print(summary(pipeline.model, folder.read_table()))
        print(f"image by image: {folder.folder / table.name}")


if __name__ == "__main__":
    cli.run(main)
