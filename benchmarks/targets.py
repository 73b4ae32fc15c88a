"""What the speed should be at least, and what is known about the way there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.report import number, percent
from benchmarks.rows import ALONE, AMM, OURS, PLAIN, Row, find

BF16 = "bf16 compiled"
MAX_ERROR = 2e-2  # of a bf16 forward
MAX_AMM_COST = 0.03  # of the time without


@dataclass(frozen=True)
class Target:
    """field: of the row, that should be at least ``least``. paths: any of them will do; of shares that of most rounds counts.
    batch: the target is for no other."""

    text: str
    work: str
    model: str
    paths: tuple[str, ...]
    least: float
    field: str = "speedup"
    batch: int | None = None


TARGETS = (  # for two cores of an AVX-512 CPU, each against the plain formulation of the same run
    Target("EDT-S/2 forward, batch 8, fp32", "forward", "EDT-S/2", ("fp32", "fp32 compiled"), 1.4, batch=8),
    Target("EDT-S/2 forward, batch 8, bf16 compiled", "forward", "EDT-S/2", (BF16,), 3.0, batch=8),
    Target("EDT-B/2 forward, bf16 compiled", "forward", "EDT-B/2", (BF16,), 4.3),
    Target("EDT-S/2 masked training step, bf16 compiled", "training", "EDT-S/2", (BF16,), 2.5),
    Target("MDTv2-S/2 masked training step, bf16 compiled", "training", "MDTv2-S/2", (BF16,), 2.5),
    Target("EDT-S/2 sampling, from noise to files", "sampling", "EDT-S/2", (BF16,), 3.0),
    Target("EDT-B/2 optimizer and average", "optimizer", "EDT-B/2", (OURS,), 3.0),
    Target("EDT-B/2 forward, batch 16, share", "forward", "EDT-B/2", (BF16, BF16 + ALONE), 0.70, "share", 16),
)


def target_lines(rows: Sequence[Row]) -> Iterator[str]:
    """One for each target whose row is there: the figure, whether it is enough, and what bounds it."""
    for target in TARGETS:
        found = [find(rows, target.work, target.model, path) for path in target.paths]
        found = [row for row in found if row is not None and getattr(row, target.field) is not None]
        if target.batch is not None:
            found = [row for row in found if row.batch == target.batch]
        if not found:
            continue
        row = max(found, key=lambda row: row.rounds if target.field == "share" else getattr(row, target.field))
        value = getattr(row, target.field)
        show = percent if target.field == "share" else lambda value: f"{value:.2f}"
        verdict = "met" if value >= target.least else "not met"
        path = f" ({row.path})" if len(target.paths) > 1 else ""
        yield f"- {target.text}{path}: {show(value)}, target {show(target.least)}: {verdict}{_bound(row, rows)}"
    yield from _cost_of_amm(rows)
    wrong = [row.error for row in rows if row.work == "forward" and row.path.startswith("bf16") and row.error is not None]
    if wrong:
        verdict = "met" if max(wrong) <= MAX_ERROR else "not met"
        yield f"- Error of bf16 forwards: at most {max(wrong):.1e}, target {MAX_ERROR:.0e}: {verdict}"


def _cost_of_amm(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.amm_cost is not None:
            verdict = "met" if row.amm_cost <= MAX_AMM_COST else "not met"
            more = f"AMM takes {100 * row.amm_cost:.1f} % more time, target at most {percent(MAX_AMM_COST)}"
            yield f"- {row.model} forward, {row.path.removesuffix(AMM)}: {more}: {verdict}"


def _bound(row: Row, rows: Sequence[Row]) -> str:
    """What is left of the time, and what it would be at this machine's rates; no bound in the strict sense."""
    if row.ceiling is None:
        return ""
    if row.work == "optimizer":
        return f"; at the rate of copying memory it would be {row.ceiling:.2f}"
    plain = find(rows, row.work, row.model, PLAIN)
    faster = row.product_gflops / plain.product_gflops if plain and plain.product_gflops else None
    rates = f", {faster:.2f} times fp32's" if faster and row.path.startswith("bf16") else ""
    return (
        f"; {percent(row.share)} of its time are its products, alone at {number(row.product_gflops)} GFLOP/s{rates}; "
        f"if nothing else took time, it would be {row.ceiling:.2f}"
    )
