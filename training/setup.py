"""From the flags of :mod:`training.options` to a :class:`training.loop.Run`, new, warm-started or resumed."""

import contextlib
import dataclasses
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from data.codec import load_codec
from data.sources import DummySource, ImageSource, Source
from data.store import PUBLISHED_CODEC, LatentStore
from models import create_model
from models.checkpoints import Checkpoint, check_name, describe, load_weights, read_checkpoint, warm_start
from models.registry import model_config
from models.resolution import change_resolution
from runtime import watch
from runtime.distributed import check_precision, my_share, note, start, start_training, together
from runtime.fetch import fetch
from runtime.locks import folder_lock
from runtime.redact import redact_values
from runtime.stopping import StopRequest
from training.autobatch import check_auto, choose_micro_batch_size
from training.checkpoint import new_run_folder, remove_leftovers, run_folder_of
from training.data import Batches, DataOrder
from training.logging import open_trackers
from training.loop import Evaluate, Run, Schedule
from training.objective import Objective, create_objective
from training.placement import Replicated, Sharded
from training.profiles import Profiles
from training.resume import read_state
from training.shards import is_sharded
from training.step import TrainingStep

DEFAULT_IMAGE_SIZE = 256
DUMMY_IMAGES = 1_281_167  # as many as ImageNet has

MODEL_FLAGS = ("mediator_num", "mediator_layers", "decode_layer")  # fields of some models' configs
SAVE_SECONDS = 600  # what a process whose launcher is gone has to finish a step and save

GridWriter = Callable[[nn.Module, Path, int], None]  # (average, run folder, step): draws samples
MakeGridWriter = Callable[[Namespace, dict], GridWriter | None]
OpenEvaluation = Callable[[Namespace, dict, nn.Module, PartialState], Evaluate | None]


def train(args: Namespace, grid_writer: MakeGridWriter, open_evaluation: OpenEvaluation, *, needs_init: bool = False) -> None:
    """A training script from its parsed flags on.

    grid_writer: from the flags and the ``config`` of the run's checkpoints to what draws samples, None for no samples.
    open_evaluation: from these, a network of the run and the processes to what measures samples, None for no evaluations.
    needs_init: a new run must not start from fresh weights. Raises ValueError as :func:`prepare_run` and :meth:`Run.train`.
    """
    watch.orphan_grace_seconds = SAVE_SECONDS
    with StopRequest(args.time_limit) as stop, contextlib.ExitStack() as held:
        run = prepare_run(args, start(), held, grid_writer, open_evaluation, needs_init=needs_init)
        run.train(stop)
        run.accelerator.end_training()


def prepare_run(
    args: Namespace,
    state: PartialState,
    held: contextlib.ExitStack,
    grid_writer: MakeGridWriter,
    open_evaluation: OpenEvaluation,
    *,
    needs_init: bool = False,
) -> Run:
    """held: until it is closed, the run's folder belongs to this job. The others: see :func:`train`.

    Raises ValueError for data, a model, an objective or a checkpoint that do not fit one another or the flags, for a batch that
    the processes cannot share, and for a folder that another job works in."""
    batch = args.global_batch_size
    _check_processes(args, state)
    source, num_classes = open_source(args, state.device)
    objective = create_objective(args)
    torch.manual_seed(args.seed)
    model = new_model(args, source, num_classes, objective)
    mask_places = _mask_places(args, model)
    facts = _facts(args, model, source, objective)
    with together():
        sample = grid_writer(args, facts["config"])
    path, found = _resumed(args, facts, state, held)
    if found:
        folder = path.parent.parent
        if not is_sharded(path):
            load_weights(model, found["model"], path)
    else:
        start_weights(args, model, source, objective, required=needs_init)
    evaluate = open_evaluation(args, facts["config"], model, state)  # may take minutes, in which mistakes are not to hide
    accelerator = start_training(args.precision)
    share = my_share(range(batch), accelerator)
    micro_batch_size = args.micro_batch_size or len(share)
    if micro_batch_size == "auto":
        chosen = (found or {}).get("auto_micro_batch")  # sums in the same order are part of an exact resume
        if not chosen or chosen["share"] != len(share):
            size = choose_micro_batch_size(args, model, objective, mask_places, len(share), accelerator)
            chosen = {"share": len(share), "size": size}
        facts["auto_micro_batch"], micro_batch_size = chosen, chosen["size"]
    if not found:
        folder = _new_folder(args, state, held)  # only now, so that a mistake leaves no empty run behind
    _start_trackers(accelerator, folder, args, found["step"] if found else None)
    placement = (Sharded if args.fsdp else Replicated)(args, model, accelerator)
    if found:
        found = placement.load(found, path)
    profiles = _profiles(args, placement.network, state, found, path)
    order = DataOrder(source.num_images, batch, args.seed)
    train_step = _training_step(args, placement, objective, share, micro_batch_size)
    batches = Batches(
        source, order, share, null_label=num_classes, label_dropout=args.label_dropout, mask_places=mask_places
    )  # fmt: skip
    run = Run(placement, train_step, batches, _schedule(args, order), folder, facts, sample, evaluate, profiles)
    if found:
        run.restore(found)
    return run


def _profiles(
    args: Namespace, network: nn.Module, state: PartialState, found: dict | None, path: Path | None
) -> Profiles | None:
    """Those of ``--ema-profiles``, as they were where a run goes on; None on all processes but the main one."""
    with together():
        if not (args.ema_profiles and state.is_main_process):
            return None
        profiles = Profiles(network, args.ema_profiles)
        if found:
            profiles.load(found.get("profiles") or {}, path)
        return profiles


def _check_processes(args: Namespace, state: PartialState) -> None:
    """Raises ValueError for flags that these processes on their devices cannot follow."""
    batch, device = args.global_batch_size, state.device
    if batch % state.num_processes:
        raise ValueError(f"--global-batch-size {batch} is not divisible by the number of processes, {state.num_processes}")
    if args.fsdp and not torch.distributed.is_initialized():
        raise ValueError("--fsdp spreads the model over processes: start several with torchrun, or leave it out")
    check_precision(args.precision, device)
    if args.micro_batch_size == "auto":
        check_auto(device)
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # torch.compile's own choice
    if args.compile and device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(
            f"--compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, name it in the variable CXX, "
            "or leave --compile out"
        )


def _training_step(
    args: Namespace, placement: Replicated | Sharded, objective: Objective, share: range, micro_batch_size: int
) -> TrainingStep:
    return TrainingStep(
        accelerator=placement.accelerator,
        model=placement.model,
        optimizer=placement.optimizer,
        ema=placement.ema,
        diffusion=objective.mathematics,
        timestep_sampler=objective.timestep_sampler,
        seed=args.seed,
        global_batch_size=args.global_batch_size,
        share=share,
        micro_batch_size=micro_batch_size,
        grad_clip=args.grad_clip,
    )


def open_source(args: Namespace, device: torch.device) -> tuple[Source, int]:
    """The latents and the number of classes, checked against each other and against --image-size."""
    source = _source(args, device)
    if args.image_size and args.image_size != source.image_size:
        raise ValueError(
            f"{args.feature_path} holds images of {source.image_size} pixels, --image-size says {args.image_size}: "
            "leave the flag out, or extract the images at that size"
        )
    num_classes = args.num_classes or source.num_classes
    if source.labels.max() >= num_classes:
        where = args.feature_path or args.data_path or "--dummy"
        raise ValueError(f"{where} holds label {source.labels.max()}, but --num-classes is {num_classes}")
    return source, num_classes


def _source(args: Namespace, device: torch.device) -> Source:
    image_size, codec = args.image_size or DEFAULT_IMAGE_SIZE, args.vae or PUBLISHED_CODEC
    if args.feature_path:
        return LatentStore.open(args.feature_path)
    if args.data_path:
        return ImageSource(args.data_path, image_size, load_codec(codec, device), num_workers=args.num_workers)
    return DummySource(DUMMY_IMAGES, args.num_classes or 1000, image_size=image_size, codec=codec)


def new_model(args: Namespace, source: Source, num_classes: int, objective: Objective) -> nn.Module:
    """The named model for these latents, with fresh weights."""
    channels, side, _ = source.latent_shape
    settings = {"input_size": side, "in_channels": channels, "num_classes": num_classes}
    config = model_config(args.model)
    for name in MODEL_FLAGS:
        value = getattr(args, name)
        if value is not None and not hasattr(config, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: {args.model} has no such setting; leave the flag out")
        settings |= {name: value} if value is not None else {}
    if hasattr(config, "keep_sigma"):
        # Gaussian diffusion also learns the variance, which a transport does not have.
        settings["keep_sigma"] = objective.facts["name"] == "gaussian"
    model = create_model(args.model, **settings)
    return model if args.masked or not hasattr(model, "without_masked_pass") else model.without_masked_pass()


def _mask_places(args: Namespace, model: nn.Module) -> tuple | None:
    """None: no masked pass."""
    if not args.masked:
        return None
    if not hasattr(model.config, "mask_places"):
        raise ValueError(f"--masked: {args.model} has no masked pass; leave the flag out")
    return model.config.mask_places


def start_weights(args: Namespace, model: nn.Module, source: Source, objective: Objective, *, required: bool) -> None:
    """Put the weights of a checkpoint into a fresh model, where the flags name one: as they are, or brought to the resolution
    of the data."""
    low = getattr(args, "resume_ckpt_low_resolution", None)
    if low:
        checkpoint = _raised(low, args.model, source.latent_shape[1])
    elif args.init_from:
        checkpoint = _read(args.init_from, args.model)
    elif required:
        raise ValueError("--resume-ckpt-low-resolution is missing: the checkpoint to start from (there is no run to resume)")
    else:
        return
    _compare_objectives(checkpoint, objective, strict=bool(low))
    for name in MODEL_FLAGS:
        asked, held = (_setting(config, name) for config in (model.config, checkpoint.config))
        if asked != held:
            flag = f"--{name.replace('_', '-')} {asked or '(none)'}"
            raise ValueError(f"{flag}: {checkpoint.path} has {held or 'none'}; give the same")
    if not warm_start(model, checkpoint):
        note(f"{checkpoint.path} has another number of classes: the label table starts afresh")
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise ValueError(f"{checkpoint.path}: {broken[0]} is not finite: nothing can be learned from there")


def _setting(config: object, name: str) -> int | None:
    """What a model has of a flag; mediator_layers counted, for None says all of them."""
    return getattr(config, "mediator_depth" if name == "mediator_layers" else name, None)


def _read(path: str, model: str) -> Checkpoint:
    """Raises ValueError where the file holds another model."""
    checkpoint = read_checkpoint(fetch(path), model=model)
    check_name(checkpoint, model)
    return checkpoint


def _compare_objectives(checkpoint: Checkpoint, objective: Objective, *, strict: bool) -> None:
    """Say where the weights were trained to predict something else; with ``strict``, to go on as they were, refuse it."""
    for what in ("name", "path_type", "prediction"):
        held, asked = checkpoint.objective.get(what), objective.facts.get(what)
        if held and asked and held != asked:
            flag = "objective" if what == "name" else what.replace("_", "-")
            difference = f"{checkpoint.path} was trained with --{flag} {held}, this run has {asked}"
            if strict:
                raise ValueError(f"{difference}: give the same")
            note(difference)


def _raised(path: str, model: str, side: int) -> Checkpoint:
    """The checkpoint, believed to hold ``model``, for latents of that side. Raises ValueError unless it is of smaller ones."""
    checkpoint = _read(path, model)
    if checkpoint.config.input_size >= side:
        raise ValueError(
            f"--resume-ckpt-low-resolution {path} is of latents {checkpoint.config.input_size} wide, the data's are {side}: "
            "it must come from a lower resolution; to start at its own, use attention_mediator/train.py --init-from"
        )
    state, config, report = change_resolution(checkpoint.state, checkpoint.config, side)
    for line in report:
        note(f"{path}: {line}")
    return dataclasses.replace(checkpoint, state=state, config=config)


def _resumed(args: Namespace, facts: dict, state: PartialState, held: contextlib.ExitStack) -> tuple[Path | None, dict | None]:
    """The checkpoint that ``--resume`` means and its content, its run's folder locked; None for a new run."""
    if not args.resume:
        return None, None
    folder = [None]
    with together():
        if state.is_main_process:
            folder = [run_folder_of(args.resume, args.results_dir, args.model)]
            if folder[0]:
                held.enter_context(folder_lock(folder[0]))
                remove_leftovers(folder[0])
    folder = broadcast_object_list(folder)[0]
    return read_state(args, facts, folder, state) if folder else (None, None)


def _new_folder(args: Namespace, state: PartialState, held: contextlib.ExitStack) -> Path:
    """Made and locked by one process."""
    folder = [None]
    with together():
        if state.is_main_process:
            folder = [new_run_folder(args.results_dir, args.model)]
            held.enter_context(folder_lock(folder[0]))
    return broadcast_object_list(folder)[0]


def _start_trackers(accelerator: Accelerator, folder: Path, args: Namespace, resumed_at: int | None) -> None:
    """A new folder that they refuse is removed."""
    try:
        with together():
            open_trackers(accelerator, folder, args, resumed_at)
    except (ValueError, OSError):
        if resumed_at is None and accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _schedule(args: Namespace, order: DataOrder) -> Schedule:
    steps = order.num_steps(args.epochs)
    ckpt_every = order.num_steps(args.epoch_ckpt_every) if args.epoch_ckpt_every else args.ckpt_every
    return Schedule(
        max_steps=min(steps, args.max_steps or steps),
        log_every=args.log_every,
        ckpt_every=ckpt_every,
        sample_every=args.sample_every,
        eval_every=args.eval_every,
        ema_profile_every=args.ema_profile_every or ckpt_every,
        keep_checkpoints=args.keep_checkpoints,
        max_skipped_steps=args.max_skipped_steps,
        init_lr=args.init_lr,
        final_lr=args.final_lr,
        lr_decay_steps=args.lr_decay_steps,
    )


def _facts(args: Namespace, model: nn.Module, source: Source, objective: Objective) -> dict:
    """What every checkpoint of the run says besides its state."""
    codec = {"name": source.codec, "scale": source.scale, "image_size": source.image_size}
    class_names = tuple(source.class_names or ())
    return {
        "args": redact_values(vars(args)),
        "data": {"num_images": source.num_images, "image_size": source.image_size, **source.provenance},
        "config": describe(args.model, model.config, codec=codec, class_names=class_names, objective=objective.facts),
    }
