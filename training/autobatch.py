"""``--micro-batch-size auto``: as many images at once as every GPU's memory takes."""

import copy
import functools
import gc
import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32, gather_object
from torch import nn

from models.layers import recompute_blocks
from runtime.distributed import note, together
from training.data import Batch, MaskPlace
from training.ema import EMA
from training.objective import Objective
from training.optim import create_optimizer
from training.profiles import Profiles
from training.step import TrainingStep

MOST_OF_MEMORY = 0.9  # the rest: communication, fragments, whoever else is on the device
# Of torch's plain RuntimeError, where a library found no memory for itself.
OUT_OF_MEMORY_WORDS = ("out of memory", "ALLOC_FAILED")


def check_auto(device: torch.device) -> None:
    """Raises ValueError away from CUDA."""
    if device.type != "cuda":
        raise ValueError(
            f"--micro-batch-size auto asks how much memory a CUDA GPU has, but this runs on {device.type}: give a number, or 0 "
            "for a process's whole share"
        )


def choose_micro_batch_size(
    args: Namespace,
    network: nn.Module,
    objective: Objective,
    mask_places: Sequence[MaskPlace] | None,
    share: int,
    accelerator: Accelerator,
) -> int:
    """For a share of so many images a process: the same number on all processes, in equal parts as near as can be.

    network: on any device, and left as it is. Called by all processes, before they put model and optimizer on their devices.
    Raises ValueError where not even one image fits.
    """
    with together():
        step = trial_step(args, network, objective, mask_places, accelerator)
        most = largest_fitting(memory_probe(step, accelerator.device), share)
        del step  # and with it its copies
        release(accelerator.device)
    most = min(gather_object([most]))
    if not most:
        raise ValueError(
            "--micro-batch-size auto: a GPU's memory does not take one image: try --gradient-checkpointing, --precision bf16, "
            "--fsdp with a number in place of auto, or a smaller --model"
        )
    size = math.ceil(share / math.ceil(share / most))
    note(f"--micro-batch-size auto: {most} images fit at once, {size} are used")
    return size


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 1..most that fits, 0 if none does; what fits, fits in any smaller number. Doubles, then bisects."""
    good, tried = 0, 1
    while fits(tried):
        good = tried
        if good == most:
            return good
        tried = min(2 * tried, most)
    bad = tried
    while bad - good > 1:
        tried = (good + bad) // 2
        good, bad = (tried, bad) if fits(tried) else (good, tried)
    return good


def memory_probe(step: Callable[[int], None], device: torch.device) -> Callable[[int], bool]:
    """Whether a step of so many images at once stays within the GPU's memory, with a margin."""
    allowed = MOST_OF_MEMORY * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))

    def fits(size: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        done = not runs_out_of_memory(lambda: step(size))
        peak = torch.cuda.max_memory_reserved(device)
        release(device)  # another size's blocks would be of no use to the next
        return done and peak <= allowed

    return fits


def trial_step(
    args: Namespace,
    network: nn.Module,
    objective: Objective,
    mask_places: Sequence[MaskPlace] | None,
    accelerator: Accelerator,
) -> Callable[[int], None]:
    """A training step of a copy of the network on so many made-up images, without other processes.

    A whole one, with EMA and optimizer state: not compiled, which needs more memory, and with the fewest masked tokens.
    """

    @functools.cache
    def copies() -> tuple[nn.Module, EMA, torch.optim.Optimizer, Profiles]:
        """Made in the first step: where memory does not even suffice for them, not one image fits."""
        trained = copy.deepcopy(network).to(accelerator.device).train()
        if args.gradient_checkpointing:
            recompute_blocks(trained)
        optimizer = create_optimizer(args.optimizer, trained.parameters(), args.init_lr, args.weight_decay)
        return trained, EMA(trained, args.ema_decay), optimizer, Profiles(trained, args.ema_profiles or ())

    def step(size: int) -> None:
        trained, ema, optimizer, profiles = copies()
        predict = convert_outputs_to_fp32(accelerator.autocast()(trained.__call__))
        mathematics, sampler = objective.mathematics, objective.timestep_sampler
        whole = TrainingStep(accelerator, predict, optimizer, ema, mathematics, sampler, args.seed, size, range(size), size)
        batch = made_up_batch(trained.config, size, mask_places).to(accelerator.device)
        times, _ = whole._sample_timesteps(0)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.zeros_like(weight)  # they are there in every forward but the first of a global batch
        try:
            for _ in range(1 if optimizer.state else 2):  # the first leaves the optimizer's state in memory
                losses, _ = whole._losses(batch, whole._own(times))
                accelerator.backward(losses.mean())
                optimizer.step()
                ema.update()
                profiles.update(1)
        finally:
            optimizer.zero_grad(set_to_none=True)

    return step


def made_up_batch(config: object, size: int, mask_places: Sequence[MaskPlace] | None) -> Batch:
    """With the masks that drop the fewest tokens."""
    random = torch.Generator().manual_seed(0)
    passes = 1 if mask_places is None else 2
    shape = (size, config.in_channels, config.input_size, config.input_size)
    kept = [place.kept(torch.rand(size, place.num_tokens, generator=random), place.low) for place in mask_places or ()]
    noise = torch.randn(passes, *shape, generator=random)
    return Batch(noise[0], torch.zeros(passes, size, dtype=torch.int64), noise, kept)


def runs_out_of_memory(work: Callable[[], None]) -> bool:
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def release(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
