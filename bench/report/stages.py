"""Tables of stages: the time that each took, and its predicted time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rosa_train.cli.tables import Table

from ..measuring import kernel_times
from ..measuring.names import PRODUCTS
from ..measuring.results import Row
from .rows import geomean

Times = dict[str, tuple[float | None, float | None]]  # stage -> measured, predicted


def tables(rows: Sequence[Row], limit: int | None = None) -> list[Table]:
    """For each op: every stage of every kernel, and the geometric means of measured / predicted.

    `limit` bounds the number of lines, not counting the means.
    """
    made = []
    for op in PRODUCTS:
        own = [row for row in rows if row["status"] == "ok" and row["op"] == op]
        if own:
            made.append(_table(op, own, limit))
    return made


def _table(op: str, rows: Sequence[Row], limit: int | None) -> Table:
    lines = [(row, _times(row)) for row in rows]
    found = dict.fromkeys(what for _, times in lines for what in times)
    ends = ("sum", "launch", "call")
    stages = sorted(
        (what for what in found if what not in ends),
        key=lambda what: (*kernel_times.ORDER, what).index(what),
    )
    columns = [*stages, *(what for what in ends if what in found)]
    shown = lines[:limit]
    more = f"; the first {len(shown)} of {len(lines)} lines" if len(shown) < len(lines) else ""
    table = Table(
        f"Stages of {op} in us: measured/predicted, and their ratio; launch is the call minus its "
        f"kernels{more}",
        ["case", "kernel", *columns],
    )
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, times in lines:
        for what, (measured, predicted) in times.items():
            if measured and predicted and measured > 0:
                ratios[row["kernel"]][what].append(measured / predicted)
    for row, times in shown:
        case = f"{row['mask']} k{row['k']}"
        table.rows.append([case, row["kernel"], *(_cell(times.get(what)) for what in columns)])
    for kernel, by_stage in ratios.items():
        means = [f"{geomean(by_stage[what]):.2f}" if what in by_stage else "" for what in columns]
        table.rows.append(["geometric mean", kernel, *means])
    return table


def _times(row: Row) -> Times:
    measured: dict[str, float] = row["stages_us"]
    predicted: dict[str, float] = dict(row["predicted_us"] or {})
    launch = predicted.pop("launch", None)
    total = sum(predicted.values()) if predicted else None
    times: Times = {}
    for stage, us in measured.items():
        parts = [predicted.pop(part) for part in stage.split("+") if part in predicted]
        times[stage] = us, sum(parts) if parts else None
    # Stages that are predicted but did not run.
    times |= {stage: (None, us) for stage, us in predicted.items() if us > 0}
    spent = sum(measured.values()) if measured else None
    if spent is not None or total is not None:
        times["sum"] = spent, total
        times["launch"] = None if spent is None else row["call_us"] - spent, launch
    times["call"] = row["call_us"], None if total is None else total + (launch or 0.0)
    return times


def _cell(times: tuple[float | None, float | None] | None) -> str:
    measured, predicted = times or (None, None)
    if predicted is None:
        return "" if measured is None else microseconds(measured)
    if measured is None:
        return f"-/{microseconds(predicted)}"
    ratio = f" {measured / predicted:.2f}" if predicted else ""
    return f"{microseconds(measured)}/{microseconds(predicted)}{ratio}"


def microseconds(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
