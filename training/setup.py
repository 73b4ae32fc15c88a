"""From the flags of :mod:`training.options` to a :class:`training.loop.Run`, new, warm-started or resumed."""

from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from data.store import LatentStore
from diffusion import GaussianDiffusion
from diffusion.timesteps import SAMPLERS
from models.checkpoints import Checkpoint, describe, load_weights, read_checkpoint, warm_start
from models.layers import compile_blocks
from runtime.distributed import check_precision, my_share, start_training
from training.checkpoint import new_run_folder, read_resume
from training.data import Batches, DataOrder, MaskPlace
from training.ema import EMA
from training.loop import Run, Schedule
from training.optim import create_optimizer
from training.step import TrainingStep


def open_store(args: Namespace) -> tuple[LatentStore, int]:
    """The latents and the number of classes, checked against each other."""
    store = LatentStore.open(args.feature_path)
    num_classes = args.num_classes or store.num_classes
    if store.labels.max() >= num_classes:
        raise ValueError(f"{args.feature_path} holds label {store.labels.max()}, but --num-classes is {num_classes}")
    return store, num_classes


# What the result of a run depends on: these cannot change when it is resumed.
FIXED_FLAGS = (
    "seed", "global_batch_size", "num_classes", "masked", "optimizer", "weight_decay", "ema_decay", "label_dropout",
    "timestep_sampler", "min_snr_gamma", "precision",
)  # fmt: skip


def find_folder(args: Namespace, state: PartialState) -> tuple[Path, dict | None]:
    """The run's folder, new or resumed, and the checkpoint it continues from. The folder is made by one process."""
    found = read_resume(args.resume, args.results_dir, args.model) if args.resume else None
    if found:
        _refuse_other_flags(args, found[1]["args"])
    state.wait_for_everyone()  # before a new folder appears that another process might take for a resumable run
    folder = [None]
    if state.is_main_process:
        folder = [found[0] if found else new_run_folder(args.results_dir, args.model)]
    return Path(broadcast_object_list(folder)[0]), found[1] if found else None


def _refuse_other_flags(args: Namespace, before: dict) -> None:
    pairs = [(name, before.get(name), getattr(args, name)) for name in FIXED_FLAGS]
    changed = [f"--{name.replace('_', '-')} {old} -> {new}" for name, old, new in pairs if old != new]
    if changed:
        raise ValueError(f"--resume {args.resume}: the run was begun with other flags ({', '.join(changed)}): give the same")


def prepare_run(
    args: Namespace,
    state: PartialState,
    model: nn.Module,
    store: LatentStore,
    diffusion: GaussianDiffusion,
    *,
    init_lr: float,
    mask_places: tuple[MaskPlace, ...] | None,
) -> Run:
    """model: with fresh weights; they are replaced where --resume or --init-from says so. mask_places: None trains unmasked.

    Raises ValueError for a batch that the processes cannot share, or a checkpoint that does not fit.
    """
    batch = args.global_batch_size
    if batch % state.num_processes:
        raise ValueError(f"--global-batch-size {batch} is not divisible by the number of processes, {state.num_processes}")
    check_precision(args.precision, state.device)
    source = read_checkpoint(args.init_from) if args.init_from else None
    folder, resumed = find_folder(args, state)  # last: a mistake must not leave an empty run behind
    accelerator = start_training(args.precision, log_with=["tensorboard"], project_dir=str(folder))
    accelerator.init_trackers("tensorboard")
    ema = _place(args, accelerator, model, resumed, source)
    if args.compile:
        compile_blocks(model)
    optimizer = create_optimizer(args.optimizer, model.parameters(), init_lr, args.weight_decay)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)

    order = DataOrder(store.num_images, batch, args.seed)
    share = my_share(range(batch), accelerator)
    train_step = TrainingStep(
        accelerator=accelerator,
        model=wrapped,
        optimizer=optimizer,
        ema=ema,
        diffusion=diffusion,
        timestep_sampler=SAMPLERS[args.timestep_sampler](),
        seed=args.seed,
        global_batch_size=batch,
        share=share,
        micro_batch_size=args.micro_batch_size or len(share),
    )
    null_label = model.config.num_classes
    batches = Batches(store, order, share, null_label=null_label, label_dropout=args.label_dropout, mask_places=mask_places)
    run = Run(train_step, batches, _schedule(args, order, init_lr), folder, _facts(args, model, store))
    if resumed:
        run.restore(resumed)
    return run


def _place(args: Namespace, accelerator: Accelerator, model: nn.Module, resumed: dict | None, source: Checkpoint | None) -> EMA:
    """Put the weights the run starts from into the model, the model on its device, and average from there."""
    if resumed:
        load_weights(model, resumed["model"], args.resume)
    elif source and not warm_start(model, source):
        accelerator.print(f"{source.path} has another number of classes: the label table starts afresh")
    model.to(accelerator.device)
    ema = EMA(model, args.ema_decay)
    if resumed:
        load_weights(ema.model, resumed["ema"], args.resume)
    return ema


def _schedule(args: Namespace, order: DataOrder, init_lr: float) -> Schedule:
    steps = order.num_steps(args.epochs)
    return Schedule(
        max_steps=min(steps, args.max_steps or steps),
        log_every=args.log_every,
        ckpt_every=args.ckpt_every,
        sample_every=args.sample_every,
        keep_checkpoints=args.keep_checkpoints,
        init_lr=init_lr,
        final_lr=args.final_lr,
        lr_decay_steps=args.lr_decay_steps,
    )


def _facts(args: Namespace, model: nn.Module, store: LatentStore) -> dict:
    """What every checkpoint of the run says besides its state."""
    codec = {"name": store.codec, "scale": store.scale, "image_size": store.meta["image_size"]}
    return {
        "args": vars(args),
        "config": describe(args.model, model.config, codec=codec, class_names=tuple(store.class_names or ())),
    }
