"""Train EDT on cached latents: masked, with Adan, min-SNR-5 and the loss-second-moment timestep sampler.

    accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 --feature-path FEATURES --results-dir
    RUNS torchrun --nproc_per_node=8 train_mask_adan.py ...    python train_mask_adan.py ...

Make FEATURES with extract_features.py. Everything drawn in step s is a function of (seed, s), so a resumed run equals an
uninterrupted one and a run on 8 GPUs equals one on 1 up to the order of floating-point sums.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data.codec import load_codec
from data.store import LatentStore
from diffusion import create_diffusion
from diffusion.timesteps import SAMPLERS
from models import create_model, model_names
from models.checkpoints import describe, load_weights, read_checkpoint, warm_start
from runtime import cli
from runtime.distributed import my_share, start, start_training
from sampling.generate import GaussianSampler, generate
from sampling.grids import save_grid
from training.checkpoint import new_run_folder, read_resume
from training.data import Batches, DataOrder
from training.ema import EMA
from training.loop import Run, Schedule
from training.optim import create_optimizer
from training.options import add_training_arguments
from training.step import TrainingStep


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


def open_store(args) -> tuple[LatentStore, int]:
    """The latents and the number of classes, checked against each other."""
    store = LatentStore.open(args.feature_path)
    num_classes = args.num_classes or store.num_classes
    if store.labels.max() >= num_classes:
        raise ValueError(f"{args.feature_path} holds label {store.labels.max()}, but --num-classes is {num_classes}")
    return store, num_classes


def find_folder(args, state: PartialState) -> tuple[Path, dict | None]:
    """The run's folder, new or resumed, and the checkpoint it continues from. Decided by one process for all."""
    found = read_resume(args.resume, args.results_dir, args.model) if args.resume else None
    state.wait_for_everyone()  # before a new folder appears that another process might take for a resumable run
    folder = [None]
    if state.is_main_process:
        folder = [found[0] if found else new_run_folder(args.results_dir, args.model)]
    return Path(broadcast_object_list(folder)[0]), found[1] if found else None


def grid_sampler(args, store: LatentStore, ema: EMA, num_classes: int, folder: Path, device: torch.device):
    """A function step -> grid PNG of the EMA model: rows are the first classes, four samples each."""
    codec = load_codec(args.vae or store.codec, device)
    sampler = GaussianSampler(create_diffusion(str(args.sample_steps)), ddim=True)
    classes = list(range(min(num_classes, 10)))
    labels = torch.tensor([label for label in classes for _ in range(4)])

    def sample(step: int) -> None:
        batches = generate(ema.model, sampler, codec, range(len(labels)), labels=labels.__getitem__, seed=args.seed)
        images = torch.cat([batch.images for batch in batches])
        save_grid(images.numpy(), folder / "samples" / f"{step:07d}.png", columns=4, row_labels=list(map(str, classes)))

    return sample


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    state = start()
    if args.global_batch_size % state.num_processes:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not divisible by the number of processes {state.num_processes}"
        )
    store, num_classes = open_store(args)
    channels, side, _ = store.latent_shape
    torch.manual_seed(args.seed)
    model = create_model(args.model, input_size=side, in_channels=channels, num_classes=num_classes)
    folder, resumed = find_folder(args, state)
    accelerator = start_training(args.precision, log_with=["tensorboard"], project_dir=str(folder))
    accelerator.init_trackers("tensorboard")

    if resumed:
        load_weights(model, resumed["model"], args.resume)
    elif args.init_from and not warm_start(model, read_checkpoint(args.init_from)) and state.is_main_process:
        print(f"{args.init_from} was trained on another number of classes: the label table starts afresh")
    model.to(accelerator.device)
    ema = EMA(model, args.ema_decay)
    if resumed:
        load_weights(ema.model, resumed["ema"], args.resume)
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    init_lr = args.init_lr or (5e-4 if args.model == "EDT-XL/2" else 1e-3)
    optimizer = create_optimizer(args.optimizer, model.parameters(), init_lr, args.weight_decay)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)

    order = DataOrder(store.num_images, args.global_batch_size, args.seed)
    share = my_share(range(args.global_batch_size), accelerator)
    train_step = TrainingStep(
        accelerator,
        wrapped,
        optimizer,
        ema,
        create_diffusion(min_snr_gamma=args.min_snr_gamma or None),
        SAMPLERS[args.timestep_sampler](),
        args.seed,
        args.global_batch_size,
        share,
        args.micro_batch_size or len(share),
    )
    batches = Batches(
        store,
        order,
        share,
        null_label=num_classes,
        label_dropout=args.label_dropout,
        mask_places=model.config.mask_places if args.masked else None,
    )
    codec = {"name": store.codec, "scale": store.scale, "image_size": store.meta["image_size"]}
    config = describe(args.model, model.config, codec=codec, class_names=tuple(store.class_names or ()))
    schedule = Schedule(
        max_steps=min(order.num_steps(args.epochs), args.max_steps or order.num_steps(args.epochs)),
        log_every=args.log_every,
        ckpt_every=args.ckpt_every,
        sample_every=args.sample_every,
        keep_checkpoints=args.keep_checkpoints,
        init_lr=init_lr,
        final_lr=args.final_lr,
        lr_decay_steps=args.lr_decay_steps,
    )
    run = Run(train_step, batches, schedule, folder, {"args": vars(args), "config": config})
    if resumed:
        run.restore(resumed)
    run.train(grid_sampler(args, store, ema, num_classes, folder, accelerator.device) if args.sample_every else None)
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
