"""Results as text: a table, what they were measured on, and their section in RESULTS.md."""

import datetime
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.timing import Result
from runtime.files import atomic_file

RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = """# Results

Each section is written by the benchmark it names and replaced when that runs again on the same device.
"""


def number(value: float | None) -> str:
    """Three digits or, from 100, whole."""
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


COLUMNS: tuple[tuple[str, Callable[[Result], float | None], Callable[[float | None], str]], ...] = (
    ("ms/{item}", lambda result: result.ms_per_item, number),
    ("spread", lambda result: result.spread, percent),
    ("time / {baseline}", lambda result: result.ratio, number),
    ("GFLOP/s", lambda result: result.gflops_per_second, number),
    ("products' GFLOP/s", lambda result: result.product_gflops_per_second, number),
    ("share", lambda result: result.share_of_product_rate, percent),
    ("peak MB", lambda result: None if result.peak_bytes is None else result.peak_bytes / 1e6, number),
)


def table(results: Sequence[Result], *, item: str = "image", baseline: str = "plain") -> str:
    """A Markdown table of the results, without the columns that none of them has a value for.

    item, baseline: what is counted and compared with, for the heading.
    """
    columns = [column for column in COLUMNS if any(column[1](result) is not None for result in results)]
    rows = [["case", *(title.format(item=item, baseline=baseline) for title, _, _ in columns)]]
    rows += [[result.name, *(show(value(result)) for _, value, show in columns)] for result in results]
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    return "\n".join("| " + " | ".join(_aligned(row, widths)) + " |" for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return name if device.type == "cpu" else f"{name} ({device.type})"


def environment(device: torch.device) -> str:
    """One line: device, threads, versions, date."""
    parts = [device_name(device)]
    if device.type == "cuda":
        parts.append(f"CUDA {torch.version.cuda}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}")
    else:
        parts.append(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")
    parts += [f"PyTorch {torch.__version__}", f"Python {platform.python_version()}", datetime.date.today().isoformat()]
    return ", ".join(parts)


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Replace the section ``## title`` of a Markdown file, or add it at the end; the file is made where there is none."""
    text = path.read_text() if path.exists() else HEADER
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    section = f"## {title}\n\n{body.strip()}\n"
    found = [i for i, other in enumerate(sections) if other.splitlines()[0] == f"## {title}"]
    if found:
        sections[found[0]] = section
    else:
        sections.append(section)
    whole = "\n\n".join(part.strip() for part in (head, *sections)) + "\n"
    with atomic_file(path) as file:
        file.write(whole.encode())
