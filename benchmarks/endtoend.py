"""The part of ``benchmarks.run`` that samples from noise to files, each side by its own code from end to end."""

import dataclasses
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from benchmarks.networks import randomized
from benchmarks.plain_loops import plain_ddim, plain_images, plain_pack, plain_write
from benchmarks.reference import plain_network
from benchmarks.rows import PLAIN, Row
from benchmarks.timing import synchronize
from diffusion import create_diffusion
from models.macs import multiply_accumulates
from models.registry import build_network
from runtime.draws import Purpose, normals
from sample_ddp import parse
from sampling.generate import label_source
from sampling.many import sample_many
from sampling.options import Pipeline, build_pipeline
from sampling.samplers import GaussianSampler

VAE_CHANNELS = (16, 32, 32, 32)
WARM_UP_STEPS = 2
LABELS = "balanced"


def save_small_vae(folder: Path) -> None:
    """An untrained AutoencoderKL of the SD VAE's geometry: 8 times downsampling, 4 channels, scale 0.18215."""
    from diffusers import AutoencoderKL  # importing diffusers takes seconds

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=VAE_CHANNELS,
            norm_num_groups=4,
            latent_channels=4,
        )
    vae.save_pretrained(folder)


def sampling_rows(args: Namespace, config: object, label: str, state: PartialState) -> tuple[list[Row], list[str]]:
    """args: sample_images, sample_steps, sample_batch_size, compile. ``sample_ddp.py``'s run, the plain side's, and ours again;
    both sides did a short job before."""
    network = randomized(build_network(config)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_small_vae(folder / "vae")
        torch.save(network.state_dict(), folder / "weights.pt")
        flags, pipeline = _ours(args, folder, state)
        network, vae = network.to(state.device), _vae(folder, state.device)
        plain_seconds(args, network, vae, folder / "warm_up_plain", state.device, steps=WARM_UP_STEPS)
        before = ours_seconds(flags, pipeline, folder / "ours", state)
        plain = plain_seconds(args, network, vae, folder / "plain", state.device, steps=args.sample_steps)
        after = ours_seconds(flags, pipeline, folder / "again", state)
        error = _difference(folder)
    flops = 2 * multiply_accumulates(config) * args.sample_images * args.sample_steps
    ratios = plain / before, plain / after
    line = f"- {label}, {_path(args)}: times as fast as plain, run before it {ratios[0]:.2f}, run after it {ratios[1]:.2f}"
    return [
        Row(
            work="sampling",
            model=label,
            path=path,
            batch=args.sample_batch_size,
            ms_per_item=1e3 * statistics.median(taken) / args.sample_images,
            rounds=len(taken),
            gflops=flops / statistics.median(taken) / 1e9,
            **more,
        )
        for path, taken, more in (
            (PLAIN, [plain], {}),
            (_path(args), [before, after], {"speedup": statistics.median(ratios), "error": error}),
        )
    ], [line]


def _vae(folder: Path, device: torch.device) -> nn.Module:
    """As it is loaded, without what a codec makes of it."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).to(device).eval()


def _path(args: Namespace) -> str:
    return "bf16 compiled" if args.compile else "fp32"


def _ours(args: Namespace, folder: Path, state: PartialState) -> tuple[Namespace, Pipeline]:
    """What sample_ddp.py makes of its flags; the network is called once at the batch size, and so compiled."""
    flags = parse(
        [
            *("--ckpt", str(folder / "weights.pt"), "--vae", str(folder / "vae"), "--weights", "model", "--ddim"),
            *("--num-sampling-steps", str(args.sample_steps), "--num-fid-samples", str(args.sample_images)),
            *("--per-proc-batch-size", str(args.sample_batch_size), "--labels", LABELS),
            *("--precision", "bf16" if args.compile else "fp32", "--compile", str(args.compile)),
        ]
    )
    pipeline = build_pipeline(flags, state.device)
    few = GaussianSampler(create_diffusion(str(WARM_UP_STEPS)), ddim=True)
    warm_up = dataclasses.replace(pipeline, sampler=few)
    sample_many(Namespace(**{**vars(flags), "sample_dir": str(folder / "warm_up")}), warm_up, state)
    return flags, pipeline


def ours_seconds(flags: Namespace, pipeline: Pipeline, folder: Path, state: PartialState) -> float:
    began = time.perf_counter()
    sample_many(Namespace(**{**vars(flags), "sample_dir": str(folder)}), pipeline, state)
    return time.perf_counter() - began


def plain_seconds(
    args: Namespace, model: nn.Module, vae: nn.Module, folder: Path, device: torch.device, *, steps: int
) -> float:
    """The same images: the same noise and labels."""
    network, timesteps = plain_network(model).eval(), create_diffusion(str(steps)).timestep_map
    config, labels = model.config, label_source(LABELS, model.config.num_classes, 0, args.sample_images)
    shape = config.in_channels, config.input_size, config.input_size
    synchronize(device)
    began = time.perf_counter()
    for first in range(0, args.sample_images, args.sample_batch_size):
        ids = list(range(first, min(first + args.sample_batch_size, args.sample_images)))
        noise = normals(0, Purpose.SAMPLE_NOISE, ids, 0, shape).to(device)
        y = torch.tensor([labels(i) for i in ids], device=device)
        plain_write(plain_images(vae, plain_ddim(network, noise, y, timesteps)), folder / "png", first)
    plain_pack(folder / "png", args.sample_images, folder / "samples.npz")
    return time.perf_counter() - began


def _difference(folder: Path) -> float:
    """The relative difference of the two sides' images, measured from the middle grey."""
    [path] = (folder / "ours").glob("*.npz")
    found, expected = (np.load(file)["arr_0"].astype(float) - 128 for file in (path, folder / "plain" / "samples.npz"))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
