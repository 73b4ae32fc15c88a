"""Train EDT on cached latents: masked, with Adan, min-SNR-5 and the loss-second-moment timestep sampler.

    accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 --feature-path FEATURES
    torchrun --nproc_per_node=8 train_mask_adan.py ...    python train_mask_adan.py ...

Make FEATURES with extract_features.py. Everything drawn in step s is a function of (seed, s), so a resumed run equals an
uninterrupted one and a run on 8 GPUs equals one on 1 up to the order of floating-point sums.
"""

from collections.abc import Callable, Sequence

import torch

from data.codec import load_codec
from diffusion import create_diffusion
from models import create_model, model_names
from runtime import cli
from runtime.distributed import start
from sampling.generate import GaussianSampler, generate
from sampling.grids import save_grid
from training.loop import Run
from training.options import add_training_arguments
from training.setup import open_store, prepare_run

XL_LR, LR = 5e-4, 1e-3  # the EDT paper's


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=model_names(), default="EDT-S/2")
    parser.add_argument("--feature-path", required=True, help="latent store of extract_features.py, or the published layout")
    parser.add_argument("--num-classes", type=cli.positive_int, help="default: what the store says")
    parser.add_argument("--masked", action=cli.BooleanFlag, default=True, help="also predict from masked tokens in every step")
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    if args.resume and args.init_from:
        parser.error("--resume continues a run, --init-from starts a new one: use one of them")
    return args


def grid_writer(args, run: Run, codec_name: str) -> Callable[[int], None]:
    """A function step -> grid PNG of the EMA model: rows are the first ten classes, four samples each."""
    model = run.train_step.ema.model
    codec = load_codec(args.vae or codec_name, run.accelerator.device)
    sampler = GaussianSampler(create_diffusion(str(args.sample_steps)), ddim=True)
    classes = range(min(model.config.num_classes, 10))
    labels = [label for label in classes for _ in range(4)]

    def write(step: int) -> None:
        batches = generate(model, sampler, codec, range(len(labels)), labels=labels.__getitem__, seed=args.seed)
        images = torch.cat([batch.images for batch in batches]).numpy()
        save_grid(images, run.folder / "samples" / f"{step:07d}.png", columns=4, row_labels=[str(label) for label in classes])

    return write


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    store, num_classes = open_store(args)
    channels, side, _ = store.latent_shape
    torch.manual_seed(args.seed)
    model = create_model(args.model, input_size=side, in_channels=channels, num_classes=num_classes)
    run = prepare_run(
        args,
        state,
        model,
        store,
        create_diffusion(min_snr_gamma=args.min_snr_gamma or None),
        init_lr=args.init_lr or (XL_LR if args.model == "EDT-XL/2" else LR),
        mask_places=model.config.mask_places if args.masked else None,
    )
    run.train(grid_writer(args, run, store.codec) if args.sample_every else None)
    run.accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
