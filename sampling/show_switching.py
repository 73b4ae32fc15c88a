"""Draw when step-wise sampling went on from model to model.

    python -m sampling.show_switching SAMPLES --out switching.png
    python -m sampling.show_switching SAMPLES-A SAMPLES-B --titles "0.3, 0.1" "0.5, 0.2" --models "M = 4" "M = 16" "M = 64"

SAMPLES: folders of sample_ddp_three.py, each a column. Above, the share of the images that each model works on at each solver
step; below, how many images leave a model after each step; in the title, what was saved against the last model alone.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import cli
from runtime.figures import picture, plain, save_figure
from runtime.files import check_writable
from sampling.writers import SETTINGS

TABLE = "switch_steps.csv"
LEGEND_INCHES = 2.3  # of one model's entry
COLORS = ("#9ecae1", "#4292c6", "#084594", "#54278f", "#fd8d3c")


@dataclass(frozen=True)
class Switches:
    """What a folder tells.

    num_steps: solver steps, without an SDE's last one. switch_steps (N, models - 1): the step after which an image left each
    model, -1: never. evaluations (N, models): of each model for an image, guidance's included. gmac (N,): of an image.
    """

    num_steps: int
    switch_steps: np.ndarray
    evaluations: np.ndarray
    gmac: np.ndarray

    @property
    def num_models(self) -> int:
        return self.evaluations.shape[1]

    def shares(self) -> np.ndarray:
        """(models, num_steps): the share of the images that each model works on in solver steps 1, 2, ..., num_steps."""
        left = np.where(self.switch_steps < 0, self.num_steps, self.switch_steps)
        steps = np.arange(self.num_steps)  # done before the step
        stage = (left[:, :, None] <= steps).sum(1)  # (N, num_steps)
        return np.stack([(stage == model).mean(0) for model in range(self.num_models)])

    def costs(self) -> np.ndarray:
        """GMAC of an evaluation by each model, (models,), as the rows tell: NaN where they do not, as of a model that was never
        asked."""
        found, *_ = np.linalg.lstsq(self.evaluations, self.gmac)
        _, singular, directions = np.linalg.svd(self.evaluations, full_matrices=False)
        seen = directions[singular > 1e-9 * singular.max()]
        known = np.isclose((seen.T @ seen).diagonal(), 1)  # the model's axis lies among what the rows span
        return np.where(known, found, np.nan)

    def saved(self) -> float:
        """The part of the work saved against the last model alone, of as many evaluations; NaN where its cost is not known."""
        return float(1 - self.gmac.sum() / (self.evaluations.sum() * self.costs()[-1]))


def read_switches(folder: Path) -> Switches:
    """Raises ValueError for a folder without a finished table, and for a damaged one."""
    path = folder / TABLE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {TABLE}: pass a folder that sample_ddp_three.py has finished")
    header, *lines = path.read_text(errors="replace").splitlines() or [""]
    names = header.split(",")
    models = sum(name.startswith("evaluations_") for name in names)
    expected = ["image", "label", *(f"switch_{i}_to_{i + 1}" for i in range(1, models))]
    expected += [*(f"evaluations_{i}" for i in range(1, models + 1)), "gmac"]
    if models < 1 or names != expected:
        raise ValueError(f"{path} is no table of switches: its columns are {', '.join(names)}")
    if not lines:
        raise ValueError(f"{path} holds no images: sample it again")
    try:
        rows = np.loadtxt(lines, delimiter=",", ndmin=2)[:, 2:]
        steps = json.loads((folder / SETTINGS).read_bytes())["num_steps"] - 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {TABLE} or {SETTINGS} cannot be read ({error!r}): sample it again") from error
    switches, evaluations, gmac = rows[:, : models - 1].astype(int), rows[:, models - 1 : -1], rows[:, -1]
    if switches.max(initial=-1) > steps:
        raise ValueError(f"{path} does not fit {SETTINGS}, which tell of {steps} solver steps: sample it again")
    return Switches(steps, switches, evaluations, gmac)


def draw(columns: Sequence[Switches], titles: Sequence[str], models: Sequence[str]):
    """-> Figure"""
    from matplotlib.figure import Figure  # imported here: it costs half a second

    width = max(4.6 * len(columns), 7.0)  # inches
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    names = _legend(columns, models)
    panels = figure.subplots(2, len(columns), squeeze=False, height_ratios=(3, 2))
    for (above, below), found, title in zip(panels.T, columns, titles, strict=True):
        _draw_shares(above, found, names)
        _draw_histogram(below, found)
        above.set_title(f"{title}\n{_saving(found)}", fontsize=9)
        for axes in (above, below):
            axes.set(xlim=(0, found.num_steps))
    panels[0, 0].set_ylabel("images on each model (%)")
    panels[1, 0].set_ylabel("images that switch")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=int(width / LEGEND_INCHES), fontsize=9)
    return figure


def _draw_shares(axes, found: Switches, names: Sequence[str]) -> None:
    edges = np.arange(found.num_steps + 1)
    floor = np.zeros(found.num_steps)
    for model, share in enumerate(100 * found.shares()):
        axes.stairs(floor + share, edges, baseline=floor, fill=True, color=COLORS[model % len(COLORS)], label=names[model])
        floor = floor + share
    axes.set(ylim=(0, 100), xlabel="solver step")


def _draw_histogram(axes, found: Switches) -> None:
    """Of the steps after which images leave each model; a bar stands at the end of its step."""
    edges = np.arange(found.num_steps + 2) - 0.5
    for model, steps in enumerate(found.switch_steps.T):
        counts, _ = np.histogram(steps[steps >= 0], edges)
        color, name = COLORS[(model + 1) % len(COLORS)], f"{model + 1} to {model + 2}: "
        share = (steps >= 0).mean()
        name += f"after {steps[steps >= 0].mean():.1f}, {share:.0%} of images" if share else "never"
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.8, label=name)
    axes.set(xlabel="switches after solver step")
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _saving(found: Switches) -> str:
    saved, mean = found.saved(), found.gmac.mean()
    if np.isnan(saved):
        return f"{mean:.4g} GMAC an image; the last model was never asked"
    return f"{mean:.4g} GMAC an image, {saved:.1%} less than the last model alone"


def _legend(columns: Sequence[Switches], models: Sequence[str]) -> list[str]:
    """The models' names, with what an evaluation costs where a folder tells."""
    costs = np.array([found.costs() for found in columns])
    known = [row[~np.isnan(row)] for row in costs.T]
    return [f"{name}: {row[0]:.4g} GMAC a call" if len(row) else name for name, row in zip(models, known, strict=True)]


def show(folders: Sequence[Path], titles: Sequence[str] | None = None, models: Sequence[str] | None = None):
    """The figure. Raises ValueError for folders with other numbers of models, and for too few or too many names."""
    columns = [read_switches(folder) for folder in folders]
    numbers = [found.num_models for found in columns]
    if len(set(numbers)) > 1:
        raise ValueError(f"the folders have {', '.join(map(str, numbers))} models: draw those with as many side by side")
    titles = titles or [str(folder) for folder in folders]
    models = models or [f"model {i + 1}" for i in range(numbers[0])]
    for flag, given, number in (("--titles", titles, len(folders)), ("--models", models, numbers[0])):
        if len(given) != number:
            raise ValueError(f"{flag}: {number} are needed, got {len(given)}")
    return draw(columns, [plain(title) for title in titles], [plain(model) for model in models])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("samples", type=Path, nargs="+", help="folders of step-wise samples")
    parser.add_argument("--titles", nargs="+", help="one for each folder (default: its path)")
    parser.add_argument("--models", nargs="+", help="names of the models, in the order of use")
    parser.add_argument("--out", type=picture, default="switching.png", help="a .png, .pdf or .svg")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    check_writable(args.out)
    save_figure(show(args.samples, args.titles, args.models), args.out)
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
