"""What ``benchmarks.run`` measures, row by row: the JSON beside RESULTS.md, and the tables that come from it."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import RESULTS, device_name, markdown, number, percent
from benchmarks.timing import Result
from runtime.files import atomic_file

PLAIN = "plain fp32"
AMM = ", AMM"  # ends the path of a forward with attention modulation
ALONE = ", alone"  # ends the path of a forward that was measured once more, beside its products only
OURS = "ours"  # of an optimizer: what training chooses for the device


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way (``path``) to do one piece of ``work`` with one ``model``; ``batch`` images in a call.

    speedup: plain time over this one, the median of the rounds' own. product_gflops: of the same products alone, at the path's
    precision. share: of the time, that they would have taken. ceiling: the speed-up if they were all there is to do. error:
    the norm of the difference from the plain result over the norm of that. peak_bytes: what one call adds at its peak.
    saved_bytes: what an image leaves in memory for the way back. amm_cost: of attention modulation, the time it adds over the
    time without, the two taking turns.
    """

    work: str
    model: str
    path: str
    batch: int
    ms_per_item: float
    spread: float | None = None  # of several rounds
    rounds: int = 1
    speedup: float | None = None
    gflops: float | None = None
    product_gflops: float | None = None
    share: float | None = None
    ceiling: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    saved_bytes: float | None = None
    amm_cost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that were measured together. environment: on what. seconds: how long it took, compilation included. caption, lines:
    what the report says before and after their table."""

    environment: str
    seconds: float
    caption: str
    rows: list[Row]
    lines: list[str]


def row_of(result: Result, work: str, model: str, path: str, **more: float | None) -> Row:
    return Row(
        work=work,
        model=model,
        path=path,
        batch=result.items,
        ms_per_item=result.ms_per_item,
        spread=result.spread,
        rounds=len(result.seconds),
        speedup=None if result.ratio is None else 1 / result.ratio,
        gflops=result.gflops_per_second,
        product_gflops=result.product_gflops_per_second,
        share=result.share_of_product_rate,
        peak_bytes=result.peak_bytes,
        **more,
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+") if value else "0"


def _megabytes(value: float | None) -> str:
    return number(None if value is None else value / 1e6)


COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("batch", "batch", str),
    ("ms/image", "ms_per_item", number),
    ("spread", "spread", percent),
    ("rounds", "rounds", str),
    ("times as fast as plain", "speedup", lambda value: "-" if value is None else f"{value:.2f}"),
    ("AMM's cost", "amm_cost", lambda value: "-" if value is None else f"{100 * value:.1f} %"),
    ("GFLOP/s", "gflops", number),
    ("products' GFLOP/s", "product_gflops", number),
    ("share", "share", percent),
    ("error", "error", _scientific),
    ("peak MB", "peak_bytes", _megabytes),
    ("saved MB/image", "saved_bytes", _megabytes),
)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table without the columns that no row has a value for."""
    columns = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    heading = ["model", "path", *(title for title, _, _ in columns)]
    cells = [[row.model, row.path, *(show(getattr(row, field)) for _, field, show in columns)] for row in rows]
    return markdown([heading, *cells])


def find(rows: Iterable[Row], work: str, model: str, path: str) -> Row | None:
    return next((row for row in rows if (row.work, row.model, row.path) == (work, model, path)), None)


def json_path(size: str, device: torch.device, stem: str = "results") -> Path:
    """results-<device>.json is size S."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS.parent / f"{stem}{'' if size == 'S' else '-' + size}-{name}.json"


def write_parts(parts: dict[str, Part], path: Path) -> None:
    """Replace these parts of the file, or add them; the others stay."""
    kept = read_parts(path) if path.exists() else {}
    content = {name: dataclasses.asdict(part) for name, part in {**kept, **parts}.items()}
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_parts(path: Path) -> dict[str, Part]:
    """By name. Raises ValueError for a file that is none of :func:`write_parts`."""
    try:
        content = json.loads(path.read_text())
        return {name: Part(**{**part, "rows": [Row(**row) for row in part["rows"]]}) for name, part in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): make it with python -m benchmarks.run") from error
