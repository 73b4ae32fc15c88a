"""Maps over a grid of tokens as pictures, and the flags that choose what is drawn."""

import argparse

import numpy as np

QUERIES = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5))  # row and column, as parts of the side
CLIPPED = 99.5  # percentile of a map at which its colours end


def block_list(text: str) -> tuple[int, ...]:
    """ "7,10" -> (7, 10), an argparse type."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks: write numbers, for example 7,10") from None


def position(text: str) -> tuple[float, float]:
    """ "0.5,0.25" -> (0.5, 0.25), an argparse type."""
    try:
        row, column = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN: write two numbers, for example 0.5,0.25") from None
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise argparse.ArgumentTypeError(f"{text}: row and column are parts of the side, from 0 to 1")
    return row, column


def token_at(query: tuple[float, float], grid: int) -> int:
    """The index of the token at a (row, column) in parts of the side."""
    row, column = (min(int(part * grid), grid - 1) for part in query)
    return row * grid + column


def by_distance(matrix: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """matrix (N, N) -> the Euclidean distances, in tokens, that occur on the grid, ascending, and the mean of the entries at
    each."""
    row, column = np.divmod(np.arange(grid**2), grid)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    counts, sums = np.bincount(squared.ravel()), np.bincount(squared.ravel(), matrix.ravel())
    found = np.flatnonzero(counts)
    return np.sqrt(found), sums[found] / counts[found]


def heat_map(axes, values: np.ndarray, title: str, **kwargs):
    """values (rows, columns), or an image (H, W, 3). kwargs: of imshow."""
    drawn = axes.imshow(values, interpolation="nearest", **kwargs)
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])
    return drawn


def mark(axes, row: float, column: float) -> None:
    """A cross that shows on any colour."""
    for color, size, width in (("black", 7, 3.5), ("white", 6, 1.5)):
        axes.plot(column, row, "x", color=color, markersize=size, markeredgewidth=width)


def color_bar(axes, drawn, **kwargs):
    """Close below a small panel. kwargs: of colorbar."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((0.1, -0.12, 0.8, 0.05)), orientation="horizontal", **kwargs)
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    return bar
