"""Plots to files: the format follows the suffix."""

import argparse
import os
from pathlib import Path

from runtime.files import atomic_file

SUFFIXES = (".png", ".pdf", ".svg")


def picture(text: str) -> Path:
    """An argparse type: a file that :func:`save_figure` can write."""
    if Path(text).suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text}: a picture's name must end in one of {', '.join(SUFFIXES)}")
    return Path(text)


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: between two dollars it would read TeX."""
    return text.replace("$", r"\$")


def save_figure(figure, path: str | os.PathLike, dpi: int = 110) -> None:
    """figure: a :class:`matplotlib.figure.Figure`. dpi: pixels an inch, of a PNG and of images in the other formats."""
    with atomic_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=dpi)
