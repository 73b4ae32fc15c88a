"""Draw the Attention Modulation Matrix (AMM), and with a checkpoint the attention before and after it.

    python -m models.show_amm --model EDT-S/2 --image-size 256 --out amm.png
    python -m models.show_amm --ckpt CKPT --blocks 7,10 --level 0.5 --out attention.png

Without a checkpoint: for each kind of modulated block the factor against the distance of two tokens, the whole matrix, and the
factors around some queries. With one: what its blocks attend to in real or freshly sampled images, at one noise level.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.amm import AMM, MAXIMA, Form, amm_matrix
from models.attention_maps import AttentionMap, attention_maps, check_blocks
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.inference import prepare
from models.macs import fresh_on_meta
from models.mediators import MediatorAttention
from models.registry import VAE_DOWNSAMPLE, model_config, model_names, resolve_amm
from models.token_plots import CLIPPED, QUERIES, block_list, by_distance, color_bar, heat_map, mark, position, token_at
from runtime import cli
from runtime.distributed import start
from runtime.fetch import fetch
from runtime.figures import picture, save_figure
from runtime.files import check_writable
from sampling.options import CKPT_HELP, AMMFlag, find_codec
from sampling.probes import Probe, add_probe_arguments, make_probe, noised

OF_CKPT = ("weights", "vae", "data", "num_images", "level", "labels", "num_sampling_steps", "seed")
COLUMNS = 8  # panels in a row of the attention's figure


@dataclass(frozen=True)
class Modulation:
    """What some blocks share: the form of AMM and the side of their token grid."""

    form: Form
    grid: int
    blocks: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{named(self.blocks)}: {self.form} form, {self.grid} x {self.grid} tokens"


def named(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def modulations(config: object, amm: AMM) -> list[Modulation]:
    """Blocks of the network that AMM modulates, those alike together. Raises ValueError for blocks that cannot have AMM."""
    amm.check(config.amm_blocks)
    blocks, found = fresh_on_meta(config).blocks, {}
    for block in sorted(amm.blocks):
        found.setdefault(blocks[block].attn.grid, []).append(block)
    return [Modulation(amm.form, grid, tuple(alike)) for grid, alike in found.items()]


def draw_modulations(found: Sequence[Modulation], title: str, queries: Sequence[tuple[float, float]]):
    """A row for each: the factor against distance, the matrix, and the factors around each query. -> Figure"""
    from matplotlib import colormaps  # imported here: it costs half a second
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    columns = 2 + len(queries)
    figure = Figure(figsize=(2.5 * columns + 0.8, 2.75 * len(found) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    colors = colormaps["RdBu_r"].with_extremes(bad="0.25")
    for part, modulation in zip(np.atleast_1d(figure.subfigures(len(found), 1)), found, strict=True):
        part.suptitle(modulation.title, fontsize=10)
        grid, form = modulation.grid, modulation.form
        matrix = amm_matrix(grid, form, torch.float64).numpy()
        norm = TwoSlopeNorm(1.0, 0.0, MAXIMA[form])
        curve, whole, *around = part.subplots(1, columns)
        curve.plot(*by_distance(matrix, grid), marker=".", markersize=3)
        curve.axhline(1, color="0.6", linewidth=0.8)
        curve.set(xlabel="distance of two tokens (tokens)", ylabel="factor", ylim=(-0.05, 1.05 * MAXIMA[form]), box_aspect=1)
        curve.grid(alpha=0.3)
        cut = np.ma.masked_equal(matrix, 0)
        heat_map(whole, cut, "whole matrix", cmap=colors, norm=norm)
        whole.set(xlabel="key (token)", ylabel="query (token)")
        for axes, query in zip(around, queries, strict=True):
            token = token_at(query, grid)
            name = f"around token {token}\n(row {token // grid}, column {token % grid})"
            drawn = heat_map(axes, cut[token].reshape(grid, grid), name, cmap=colors, norm=norm)
            mark(axes, *divmod(token, grid))
        bar = part.colorbar(drawn, ax=around, shrink=0.85, label="factor (dark: 0, cut off)")
        bar.set_ticks([0, 0.5, 1, MAXIMA[form]], labels=["0", "0.5", "1", f"{MAXIMA[form]:.2f}"])
    return figure


def draw_attention(
    maps: dict[int, AttentionMap], probe: Probe, seen: np.ndarray, title: str, queries: Sequence[tuple[float, float]]
):
    """A part for each block. seen (H, W, 3) uint8: the first image with its noise. -> Figure"""
    from matplotlib.figure import Figure

    rows = [math.ceil(_number_of_panels(one, len(queries)) / COLUMNS) for one in maps.values()]
    figure = Figure(figsize=(1.75 * COLUMNS, 2.15 * sum(rows) + 0.5 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=rows))
    for part, count, (block, found) in zip(parts, rows, maps.items(), strict=True):
        form = "not modulated" if found.modulation is None else "before and after AMM"
        part.suptitle(f"block {block}, {found.grid} x {found.grid} tokens: attention {form}", fontsize=10)
        panels = iter(part.subplots(count, COLUMNS).flat)
        _draw_block(panels, found, probe.images[0], seen, queries)
        for axes in panels:
            axes.set_axis_off()
    return figure


def _number_of_panels(found: AttentionMap, num_queries: int) -> int:
    kinds = 1 if found.modulation is None else 2
    return 2 + kinds * (num_queries + 1) + 1 + found.probabilities.shape[1]


def _draw_block(panels, found: AttentionMap, image: np.ndarray, seen: np.ndarray, queries) -> None:
    """Image, noisy image; each query's map in the first image, before and after AMM; the whole matrix; against distance; the
    last query's map by each head. Attention is in units of 1/N, what each of N tokens gets where all get the same."""
    grid, tokens = found.grid, found.grid**2
    kinds = {"before": found.probabilities} if found.modulation is None else {
        "before": found.probabilities, "after": found.applied
    }  # fmt: skip
    first = {name: tokens * value[0].mean(0).cpu().numpy() for name, value in kinds.items()}  # (N, N)
    mean = {name: tokens * value.mean((0, 1)).cpu().numpy() for name, value in kinds.items()}
    shown = [token_at(query, grid) for query in queries]
    heat_map(next(panels), image, "first image")
    heat_map(next(panels), seen, "as the network sees it")
    drawn = []
    for token in shown:
        top = max(value[token].max() for value in first.values())  # before and after share their colours
        for name, value in first.items():
            axes = next(panels)
            where = f"query row {token // grid}, col. {token % grid}"
            label = where if found.modulation is None else f"{where}\n{name}"
            drawn.append((axes, heat_map(axes, value[token].reshape(grid, grid), label, cmap="magma", vmin=0, vmax=top)))
            mark(axes, *divmod(token, grid))
    top = max(np.percentile(value, CLIPPED) for value in mean.values())
    for name, value in mean.items():
        axes = next(panels)
        label = "all images, heads" + ("" if found.modulation is None else f"\n{name}")
        drawn.append((axes, heat_map(axes, value, label, cmap="magma", vmin=0, vmax=top)))
    _draw_curve(next(panels), mean, grid)
    heads = tokens * found.probabilities[0, :, shown[-1]].cpu().numpy()  # (H, N)
    when = "" if found.modulation is None else ", before"
    for head, value in enumerate(heads):
        axes = next(panels)
        drawn.append(
            (axes, heat_map(axes, value.reshape(grid, grid), f"head {head}{when}", cmap="magma", vmin=0, vmax=heads.max()))
        )
        mark(axes, *divmod(shown[-1], grid))
    for axes, heat in drawn:
        color_bar(axes, heat)


def _draw_curve(axes, mean: dict[str, np.ndarray], grid: int) -> None:
    for name, value in mean.items():
        axes.plot(*by_distance(value, grid), label=name, linewidth=1)
    axes.set(xlabel="distance (tokens)", ylim=(0, None), box_aspect=1)
    axes.set_title("mean attention x N", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(7)
    axes.grid(alpha=0.3)
    if len(mean) > 1:
        axes.legend(fontsize=6)


def _cfg_scale(args: argparse.Namespace) -> float:
    return 1.0 if args.cfg_scale is None else args.cfg_scale


def observe(args: argparse.Namespace) -> tuple[Checkpoint, dict[int, AttentionMap], Probe, np.ndarray]:
    """-> the checkpoint, the maps of the chosen blocks, what they are of, and the first image with its noise."""
    device = start().device
    checkpoint = read_checkpoint(fetch(args.ckpt), args.weights, args.model)
    amm = resolve_amm(args.model or checkpoint.model, args.amm, _cfg_scale(args), checkpoint.config.input_size)
    if not (args.blocks or amm):
        raise ValueError("--no-amm leaves no blocks to choose: name them, as --blocks 3,5")
    model = prepare(build_model(checkpoint, name=args.model, amm=amm).to(device))
    blocks = args.blocks or amm.blocks
    check_blocks(blocks, len(model.blocks))
    through = [block for block in blocks if isinstance(model.blocks[block].attn, MediatorAttention)]
    if through:
        raise ValueError(f"the attention of {named(through)} goes through mediators: see python -m models.show_mediators")
    codec = find_codec(args.vae, checkpoint, device)
    probe = make_probe(args, checkpoint, model, codec)
    x, t = noised(checkpoint, probe, args.level, args.seed)
    maps = attention_maps(model, blocks, x, t, probe.labels)
    return checkpoint, maps, probe, codec.decode(x[:1]).cpu().numpy()[0]


def show_matrices(args: argparse.Namespace):
    """The figure without a checkpoint. Raises ValueError for a model without a placement, and blocks that are not in it."""
    size = {"input_size": args.image_size // VAE_DOWNSAMPLE} if args.image_size else {}
    config = model_config(args.model, **size)
    amm = resolve_amm(args.model, args.amm, _cfg_scale(args), config.input_size)
    if amm is None:
        raise ValueError("--no-amm leaves nothing to draw: for attention without AMM pass --ckpt and --blocks")
    missing = [block for block in args.blocks or () if block not in amm.blocks]
    if missing:
        raise ValueError(
            f"--blocks {missing[0]}: the placement {amm} does not modulate it; name another, as --amm exp:{missing[0]}"
        )
    amm = dataclasses.replace(amm, blocks=args.blocks or amm.blocks)
    title = f"AMM of {args.model}, latents of {config.input_size} x {config.input_size}"
    return draw_modulations(modulations(config, amm), title, args.queries)


def show_attention(args: argparse.Namespace):
    """The figure with a checkpoint."""
    checkpoint, maps, probe, seen = observe(args)
    images = "1 image" if len(probe.images) == 1 else f"{len(probe.images)} images"
    name = checkpoint.model or type(checkpoint.config).__name__
    title = f"{name}: attention at noise level {args.level:g}, {images}; colours: 1 = the same to every token"
    return draw_attention(maps, probe, seen, title, args.queries)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=model_names(), help="with --ckpt: default: what the checkpoint holds")
    parser.add_argument("--ckpt", help=CKPT_HELP)
    parser.add_argument("--image-size", type=cli.number(int, 1, 2**14), help="without --ckpt: pixels, with a VAE of 8")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of the checkpoint")
    parser.add_argument("--vae", help="decoder, as of sample_ddp.py (default: the checkpoint's)")
    parser.add_argument("--amm", action=AMMFlag, default=True, help="True = the published placement, or for example exp:7,10")
    parser.add_argument("--blocks", type=block_list, help="blocks to draw, as 7,10 (default: those that AMM modulates)")
    parser.add_argument(
        "--queries", type=position, nargs="+", default=QUERIES, metavar="ROW,COLUMN",
        help="tokens to draw the maps of, in parts of the side (default: 0,0 0,0.5 0.5,0.5)",
    )  # fmt: skip
    parser.add_argument("--out", type=picture, default="amm.png", help="a .png, .pdf or .svg")
    add_probe_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.ckpt or args.model):
        parser.error("name a model with --model, or a checkpoint with --ckpt")
    if args.ckpt and args.image_size:
        parser.error("--image-size means nothing to --ckpt, which knows its own: leave it out")
    given = [flag for flag in OF_CKPT if getattr(args, flag) != parser.get_default(flag)]
    if given and not args.ckpt:
        parser.error(f"--{given[0].replace('_', '-')} means nothing without --ckpt: leave it out, or pass a checkpoint")
    if args.image_size and args.image_size % VAE_DOWNSAMPLE:
        parser.error(f"--image-size {args.image_size} is not divisible by {VAE_DOWNSAMPLE}, the downsampling of the VAE")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_writable(args.out)
    save_figure(show_attention(args) if args.ckpt else show_matrices(args), args.out)
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
