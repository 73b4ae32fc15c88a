"""Draw the rows of benchmarks.run: each path's rate as a bar, before the rate of its matrix products alone.

python -m benchmarks.plot benchmarks/results-DEVICE.json [--out PICTURE.png]
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import number, percent
from benchmarks.rows import ALONE, AMM, PLAIN, Row, read_parts
from runtime import cli
from runtime.figures import picture, save_figure

PANELS = {"forward": "forward", "training": "training step"}
COLORS = {
    PLAIN: "#7f7f7f",
    "fp32": "#1f77b4",
    "fp32" + AMM: "#aec7e8",
    "fp32 compiled": "#17becf",
    "bf16 compiled": "#d62728",
    "bf16 compiled" + AMM: "#ff9896",
}
ROW_INCHES = 0.23


def draw(results: Path, out: Path | None = None) -> Path | None:
    """results: the JSON; out: default, beside it under its name. Returns the picture's path, None where the rows hold no rates.
    Raises ValueError for a file that cannot be read."""
    from matplotlib.figure import Figure  # imported here: it costs half a second

    parts = read_parts(results)
    panels = {work: _with_rates(parts[work].rows) for work in PANELS if work in parts}
    panels = {work: rows for work, rows in panels.items() if rows}
    if not panels:
        return None
    path = out or results.with_suffix(".png")
    most = max(len(rows) + len({row.model for row in rows}) for rows in panels.values())
    figure = Figure(figsize=(8 * len(panels), 1.5 + ROW_INCHES * most), layout="constrained")
    figure.suptitle(parts[next(iter(panels))].environment, fontsize=10)
    for axes, (work, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_panel(axes, rows)
        axes.set(title=PANELS[work], xlabel="GFLOP/s of the plain formulation's matrix products")
    figure.legend(*_legend(panels), loc="outside lower center", ncols=5, fontsize=9)
    save_figure(figure, path)
    return path


def _with_rates(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.gflops and row.product_gflops and not row.path.endswith(ALONE)]


def _draw_panel(axes, rows: Sequence[Row]) -> None:
    models = list(dict.fromkeys(row.model for row in rows))
    place, ticks = 0.0, []
    for model in models:
        own = [row for row in rows if row.model == model]
        ticks.append(place + (len(own) - 1) / 2)
        for row in own:
            axes.barh(place, row.product_gflops, 0.9, color="#e4e4e4")
            axes.barh(place, row.gflops, 0.7, color=COLORS.get(row.path, "#9467bd"))
            faster = "" if row.speedup is None else f", {row.speedup:.2f}x plain"
            text = f" {number(row.ms_per_item)} ms{faster}, {percent(row.share)}"
            axes.text(max(row.gflops, row.product_gflops), place, text, va="center", fontsize=8)
            place += 1
        place += 1
    axes.set(yticks=ticks, yticklabels=[f"{model}\nbatch {_batch(rows, model)}" for model in models])
    axes.set_ylim(place - 1.2, -0.8)
    axes.set_xlim(right=1.45 * max(row.product_gflops for row in rows))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _batch(rows: Sequence[Row], model: str) -> int:
    return next(row.batch for row in rows if row.model == model)


def _legend(panels: dict[str, list[Row]]) -> tuple[list, list[str]]:
    from matplotlib.patches import Patch

    found = dict.fromkeys(row.path for rows in panels.values() for row in rows)
    patches = [Patch(color=COLORS.get(path, "#9467bd")) for path in found]
    return [*patches, Patch(color="#e4e4e4")], [*found, "the products alone"]


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="the JSON that benchmarks.run writes beside RESULTS.md")
    parser.add_argument("--out", type=picture, help="the picture (default: beside the JSON, under its name)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    path = draw(args.results, args.out)
    if path is None:
        raise ValueError(
            f"{args.results} holds neither forwards nor training steps: measure them with python -m benchmarks.run"
        )
    print(path)


if __name__ == "__main__":
    cli.run(main)
