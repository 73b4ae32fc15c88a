"""The picture of benchmarks.scaling."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.projection import TrainingProjection, fit_power
from benchmarks.report import percent
from runtime.figures import save_figure


def draw(
    path: Path,
    title: str,
    tokens: dict[str, dict[int, float]],
    processes: dict[int, float],
    projection: TrainingProjection | None,
    gpus: Sequence[int],
    pace: str,
) -> None:
    """Left the seconds of a forward against tokens, with the fitted lines; right the projected hours of training against GPUs,
    beside those of perfect scaling, and, where measured, the efficiency of processes here. pace: what a GPU was taken for."""
    from matplotlib.figure import Figure  # imported here: it costs half a second

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    _draw_tokens(left, tokens)
    if projection:
        _draw_projection(right, projection, gpus, pace)
    if processes.get(1):
        measured = ", ".join(f"{p}: {percent(processes[1] / seconds)}" for p, seconds in processes.items() if p > 1)
        if measured:
            right.text(0.02, 0.03, f"efficiency measured here, by processes: {measured}", transform=right.transAxes, fontsize=8)
    save_figure(figure, path, dpi=110)


def _number_axis(axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _draw_tokens(axes, tokens: dict[str, dict[int, float]]) -> None:
    for k, (label, seconds) in enumerate(tokens.items()):
        law = fit_power(seconds)
        sizes = sorted(seconds)
        axes.plot(sizes, [1e3 * seconds[size] for size in sizes], "os^D"[k % 4], color=f"C{k}", alpha=0.8)
        fitted = [1e3 * law(size) for size in sizes]
        axes.plot(sizes, fitted, "-", color=f"C{k}", alpha=0.6, label=f"{label}: tokens^{law.exponent:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="forward of one image")
    every = sorted({size for seconds in tokens.values() for size in seconds})
    axes.set_xticks(every, [str(size) for size in every])
    _number_axis(axes)
    if tokens:
        axes.legend(fontsize=9)


def _draw_projection(axes, projection: TrainingProjection, gpus: Sequence[int], pace: str) -> None:
    hours = [projection.hours(number) for number in gpus]
    axes.plot(gpus, hours, "o-", label="projected")
    axes.plot(gpus, [hours[0] / number for number in gpus], "--", color="gray", label="perfect scaling")
    for number, value in zip(gpus, hours, strict=True):
        note = percent(projection.efficiency(number))
        axes.annotate(note, (number, value), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="hours", title=f"training, projected {pace}, and its efficiency")
    axes.set_xticks(list(gpus), [str(number) for number in gpus])
    _number_axis(axes)
    axes.legend(fontsize=9)
