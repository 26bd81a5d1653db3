"""Compares two runs row by row: same, faster, slower or ambiguous."""

from __future__ import annotations

from typing import NamedTuple

from rosa_train.cli.tables import Table

from ..measuring.results import Row, key
from .rows import milliseconds, ranges_overlap

VERDICTS = (
    "slower",
    "faster",
    "ambiguous",
    "other timer",
    "same",
    "status changed",
    "only in base",
    "only in new",
)


class Comparison(NamedTuple):
    """One measurement in two runs; either may be missing."""

    base: Row | None
    new: Row | None
    verdict: str

    @property
    def row(self) -> Row:
        """The row that names the measurement."""
        row = self.new if self.new is not None else self.base
        assert row is not None
        return row

    @property
    def change(self) -> float | None:
        """t_new / t_base - 1, or None without two times."""
        if self.base is None or self.new is None:
            return None
        if self.base["median_s"] is None or self.new["median_s"] is None:
            return None
        return self.new["median_s"] / self.base["median_s"] - 1


def verdict(base: Row, new: Row, threshold: float) -> str:
    """The verdict on two timed rows: same | faster | slower | ambiguous | other timer.

    A change counts if the medians differ by more than `threshold` and the p20-p80 ranges do not
    overlap. If the ranges overlap, noise may explain the change, and the verdict is "ambiguous".
    Times of different timers cannot be compared. Old rows name no timer and are compared with any.
    """
    timers = base["timer"], new["timer"]
    if None not in timers and timers[0] != timers[1]:
        return "other timer"
    if abs(new["median_s"] / base["median_s"] - 1) <= threshold:
        return "same"
    if ranges_overlap(base, new):
        return "ambiguous"
    return "faster" if new["median_s"] < base["median_s"] else "slower"


def compare(base: list[Row], new: list[Row], threshold: float = 0.05) -> list[Comparison]:
    """All measurements of two runs, matched by device, threads, case, kernel, mode and charge."""
    old, fresh = ({key(row): row for row in rows} for rows in (base, new))
    found = []
    for name in dict.fromkeys([*old, *fresh]):
        a, b = old.get(name), fresh.get(name)
        if a is None or b is None:
            found.append(Comparison(a, b, "only in base" if b is None else "only in new"))
        elif a["status"] != b["status"]:
            found.append(Comparison(a, b, "status changed"))
        elif a["status"] == "ok":
            found.append(Comparison(a, b, verdict(a, b, threshold)))
    return found


def tables(found: list[Comparison], *, show_same: bool = False) -> list[Table]:
    """The changes, worst first, and the number of rows with each verdict."""
    details = Table(
        "Changes", ["case", "kernel", "mode", "charge", "verdict", "base ms", "new ms", "change"]
    )
    for item in sorted(found, key=lambda c: (VERDICTS.index(c.verdict), -(c.change or 0))):
        if item.verdict == "same" and not show_same:
            continue
        change = item.change
        details.rows.append(
            [
                *(item.row[column] for column in ("case", "kernel", "mode", "charge")),
                item.verdict,
                _time(item.base),
                _time(item.new),
                "-" if change is None else f"{change:+.1%}",
            ]
        )
    counts = Table("Verdicts", ["verdict", "rows"])
    for name in VERDICTS:
        count = sum(item.verdict == name for item in found)
        if count:
            counts.rows.append([name, str(count)])
    return [table for table in (details, counts) if table.rows]


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    return row["status"] if row["median_s"] is None else milliseconds(row)
