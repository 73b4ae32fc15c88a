"""Draw what attention mediators gather from the tokens, and what the tokens read from them.

    python -m models.show_mediators --ckpt CKPT --block 2 --level 0.5 --out mediators.png
    python -m models.show_mediators --ckpt CKPT4 CKPT16 CKPT64 --out mediators.png

Each checkpoint is a column. A map of tokens stands where its mediator is on the mediators' own grid; a frame shows the part of
the image that the mediator is the mean query of. Real or freshly sampled images, at one noise level.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from models.attention_maps import MediatorMap, attention_maps, check_blocks
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.inference import prepare
from models.mediators import MediatorAttention
from models.token_plots import CLIPPED, color_bar, heat_map, mark, position, token_at
from runtime import cli
from runtime.distributed import start
from runtime.fetch import fetch
from runtime.figures import picture, plain, save_figure
from runtime.files import check_writable
from sampling.alike import require_common
from sampling.options import CKPT_HELP, find_codec
from sampling.probes import Probe, add_probe_arguments, make_probe, noised

ROWS = ("gathered", "read", "joint")


def mosaic(maps: np.ndarray) -> np.ndarray:
    """maps (M, n, n) -> the maps on the mediators' grid, row by row, with a line of NaN between them."""
    number, n, _ = maps.shape
    side = round(number**0.5)
    sheet = np.full((side, n + 1, side, n + 1), np.nan)
    sheet[:, :n, :, :n] = maps.reshape(side, side, n, n).transpose(0, 2, 1, 3)
    return sheet.reshape(side * (n + 1), side * (n + 1))[:-1, :-1]


def windows(grid: int, side: int) -> list[tuple[int, int]]:
    """[first, end) of the tokens along one axis that each mediator's query is the mean of: adaptive pooling's."""
    return [(k * grid // side, -(-(k + 1) * grid // side)) for k in range(side)]


def maps_of(found: MediatorMap, query: tuple[float, float], head: int | None) -> dict[str, np.ndarray]:
    """One map for each row of the figure, in units of what each would be if all weights were equal.

    gathered (M, n, n): each mediator's weights of the tokens, times N. read (M, n, n): each token's weights of the mediators,
    times M. Both are means over images and heads, or of one head. joint (n, n): what the query's token takes from the tokens by
    way of all mediators, times N, in the first image.
    """
    heads = slice(None) if head is None else slice(head, head + 1)
    n, mediators = found.grid, found.mediator_side**2
    gather = found.gather[:, heads].mean((0, 1)).view(mediators, n, n)
    read = found.read[:, heads].mean((0, 1)).t().reshape(mediators, n, n)
    joint = (found.read[0, heads, token_at(query, n), None] @ found.gather[0, heads]).mean(0).view(n, n)
    values = (n**2 * gather, mediators * read, n**2 * joint)
    return {name: value.cpu().numpy() for name, value in zip(ROWS, values, strict=True)}


def draw(
    columns: dict[str, MediatorMap], pictures: Sequence[np.ndarray], title: str, query: tuple[float, float], head: int | None
):
    """columns: a map for each checkpoint, by what is written above it. pictures: the first image, and as the networks see it.
    -> Figure"""
    from matplotlib.figure import Figure  # imported here: it costs half a second

    names = ("what each mediator gathers", "where each mediator is read", "both: a token's attention")
    figure = Figure(figsize=(3.0 * (len(columns) + 0.75), 3.25 * len(ROWS) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(ROWS), 1 + len(columns), width_ratios=[0.75] + [1] * len(columns))
    first, seen = pictures
    heat_map(grid[0, 0], first, "first image")
    heat_map(grid[1, 0], seen, "as the networks see it")
    heat_map(grid[2, 0], first, "first image, and the token")
    side = len(first)
    tokens = next(iter(columns.values())).grid
    mark(grid[2, 0], *((place + 0.5) * side / tokens - 0.5 for place in divmod(token_at(query, tokens), tokens)))
    for axes, (name, found) in zip(grid.T[1:], columns.items(), strict=True):
        maps = maps_of(found, query, head)
        for panel, row, what in zip(axes, ROWS, names, strict=True):
            values = maps[row]
            shown = mosaic(values) if values.ndim == 3 else values
            top = max(1.0, float(np.percentile(values, CLIPPED)))
            drawn = heat_map(panel, shown, f"{name}: {what}", cmap="magma", vmin=0, vmax=top)
            color_bar(panel, drawn).set_label("1 = equal weights", fontsize=7, labelpad=1)
        _frame_windows(axes[0], found)
        mark(axes[2], *divmod(token_at(query, found.grid), found.grid))
    return figure


def _frame_windows(axes, found: MediatorMap) -> None:
    from matplotlib.patches import Rectangle

    for i, (top, bottom) in enumerate(windows(found.grid, found.mediator_side)):
        for j, (left, right) in enumerate(windows(found.grid, found.mediator_side)):
            corner = (j * (found.grid + 1) + left - 0.5, i * (found.grid + 1) + top - 0.5)
            axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="deepskyblue", linewidth=0.9))


def build(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> torch.nn.Module:
    """Raises ValueError for a block that is not there, or has no mediators, and a head likewise."""
    model = prepare(build_model(checkpoint).to(device))
    check_blocks([args.block], len(model.blocks))
    attention = model.blocks[args.block].attn
    if not isinstance(attention, MediatorAttention):
        with_them = [str(i) for i, block in enumerate(model.blocks) if isinstance(block.attn, MediatorAttention)]
        raise ValueError(
            f"--block {args.block}: {checkpoint.path} has no mediators there; blocks that do: {', '.join(with_them) or 'none'}"
        )
    if args.head is not None and args.head >= attention.num_heads:
        raise ValueError(
            f"--head {args.head}: block {args.block} of {checkpoint.path} has heads 0 to {attention.num_heads - 1}"
        )
    return model


def observe(args: argparse.Namespace) -> tuple[dict[str, MediatorMap], Probe, list[np.ndarray]]:
    """-> the block's maps by the column's title; what they are of; the first image without and with noise, as the first network
    sees it."""
    device = start().device
    checkpoints = [read_checkpoint(fetch(path), args.weights) for path in args.ckpt]
    for other in checkpoints[1:]:
        require_common(checkpoints[0], other, "checkpoints side by side")
    models = [build(args, checkpoint, device) for checkpoint in checkpoints]
    codec = find_codec(args.vae, checkpoints[0], device)
    probe = make_probe(args, checkpoints[0], models[0], codec)
    x, t = noised(checkpoints[0], probe, args.level, args.seed)
    columns = {}
    for path, model in zip(args.ckpt, models, strict=True):
        found = attention_maps(model, [args.block], x, t, probe.labels)[args.block]
        name = f"M = {found.mediator_side**2}"
        columns[name if name not in columns else f"{name}, {plain(path)}"] = found
    return columns, probe, [probe.images[0], codec.decode(x[:1]).cpu().numpy()[0]]


def show(args: argparse.Namespace):
    """The figure."""
    columns, probe, pictures = observe(args)
    count, which = len(probe.images), "mean over heads" if args.head is None else f"head {args.head}"
    images = f"{count} images" if count > 1 else "1 image"
    title = f"Mediators in block {args.block} at noise level {args.level:g}; {which} and over {images} (both: the first)"
    return draw(columns, pictures, title, args.query, args.head)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--ckpt", nargs="+", required=True, help=f"one a column; the first makes fresh images. {CKPT_HELP}")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of the checkpoints")
    parser.add_argument("--vae", help="decoder, as of sample_ddp.py (default: the first checkpoint's)")
    parser.add_argument("--block", type=cli.non_negative_int, default=0, help="counted from 0")
    parser.add_argument("--head", type=cli.non_negative_int, help="counted from 0 (default: the mean over all)")
    parser.add_argument(
        "--query", type=position, default=(0.5, 0.5), metavar="ROW,COLUMN",
        help="the token of the last row, in parts of the side (default: 0.5,0.5)",
    )  # fmt: skip
    parser.add_argument("--out", type=picture, default="mediators.png", help="a .png, .pdf or .svg")
    add_probe_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_writable(args.out)
    save_figure(show(args), args.out)
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
