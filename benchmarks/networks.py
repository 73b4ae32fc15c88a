"""What the benchmarks of networks share: flags, weights and inputs, and the calls that are timed."""

import copy
from argparse import Namespace
from collections.abc import Callable
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from data.sources import DummySource
from models.inference import prepare
from models.layers import compile_blocks
from models.registry import FAMILIES
from runtime import cli
from runtime.distributed import start_training
from training.data import Batch, Batches, DataOrder
from training.objective import DEFAULTS, create_objective
from training.placement import Replicated
from training.step import TrainingStep

SEED = 0
LEARNING_RATE = 1e-6  # the work is the same at any; a small one keeps the weights where they are
EMA_DECAY = 0.9999


def add_limit_arguments(parser: cli.ArgumentParser, *, repeats: int, budget_seconds: float, budget_is_for: str) -> None:
    """How long is measured, on how many threads."""
    parser.add_argument("--repeats", type=cli.positive_int, default=repeats, help="rounds in which every case is timed once")
    parser.add_argument("--warmup", type=cli.positive_int, default=1, help="rounds before them that do not count")
    parser.add_argument(
        "--budget-seconds", type=cli.positive_float, default=budget_seconds, help=f"{budget_is_for}: none begins later"
    )
    parser.add_argument("--threads", type=cli.positive_int, help="of the CPU (default: as torch chooses)")


def limits(args: Namespace) -> dict:
    """What :func:`benchmarks.timing.measure` takes of :func:`add_limit_arguments`."""
    return {"repeats": args.repeats, "warmup": args.warmup, "budget_seconds": args.budget_seconds}


def modes(args: Namespace) -> tuple[str, ...]:
    """What follows the names of cases: nothing, and with --compile also the compiled ones."""
    return ("", ", compiled") if args.compile else ("",)


def randomized(model: nn.Module) -> nn.Module:
    """The model with N(0, 0.02) in place of the parameters that start as zeros, so that every block contributes."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def compiled(model: nn.Module) -> nn.Module:
    """A copy with the same weights in memory, whose blocks are compiled, as training does it."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    compile_blocks(twin)
    return twin


def random_inputs(config, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y of a forward; t are steps below 1000, for a transport times in [0, 1)."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch_size, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.randint(0, 1000, (batch_size,), generator=generator)
    y = torch.randint(0, config.num_classes, (batch_size,), generator=generator)
    if FAMILIES[type(config)].objective == "transport":
        t = t / 1000
    return x.to(device), t.to(device), y.to(device)


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy as compiled sampling has it."""
    return prepare(copy.deepcopy(model), dtype, compile=True)


def forward_call(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """In inference mode. dtype: of autocast, which casts the weights at every call here; float32: none."""
    device = inputs[0].device

    @torch.inference_mode()
    def call() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(*inputs)

    return call


def training_batch(config, batch_size: int, *, masked: bool) -> Batch:
    """The first of :func:`batches_of`, as training would have it in memory."""
    batch = batches_of(config, batch_size, masked=masked)(0)
    return batch.pin() if torch.cuda.is_available() else batch


def batches_of(config, batch_size: int, *, masked: bool) -> Batches:
    """Random images; the masked pass drops the mean share of the tokens, so that every step does the same work."""
    source = DummySource(batch_size, config.num_classes, (config.in_channels, config.input_size, config.input_size))
    places = [_at_mean_share(place) for place in config.mask_places] if masked else None
    order, share = DataOrder(batch_size, batch_size, SEED), range(batch_size)
    return Batches(source, order, share, null_label=config.num_classes, mask_places=places)


def _at_mean_share(place):
    mean = (place.low + place.high) / 2
    return place._replace(low=mean, high=mean)


def training_step(
    network: nn.Module,
    batch_size: int,
    accelerator: Accelerator,
    optimizer: str = "adan",
    *,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    **recipe: str | float,
) -> TrainingStep:
    """The pieces of the training scripts, put together as they do it. compile, gradient_checkpointing: as their flags. recipe:
    of the objective, in place of the scripts' defaults for the network's."""
    args = Namespace(
        ema_decay=EMA_DECAY,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        optimizer=optimizer,
        init_lr=LEARNING_RATE,
        weight_decay=0.0,
    )
    placement = Replicated(args, network, accelerator)
    name = FAMILIES[type(network.config)].objective
    objective = create_objective(Namespace(objective=name, **DEFAULTS[name] | recipe))
    return TrainingStep(
        accelerator=accelerator,
        model=placement.model,
        optimizer=placement.optimizer,
        ema=placement.ema,
        diffusion=objective.mathematics,
        timestep_sampler=objective.timestep_sampler,
        seed=SEED,
        global_batch_size=batch_size,
        share=range(batch_size),
        micro_batch_size=batch_size,
    )


def fresh_accelerator(precision: str) -> Accelerator:
    """accelerate keeps one precision for the life of a process; what an earlier accelerator has prepared keeps its own."""
    AcceleratorState._reset_state()
    return start_training(precision)
