"""Properties of rows and ratios of two rows, as all tables and plots use them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ..contenders.peers import family_of, peer_families
from ..measuring.clocks import WITH_HOST
from ..measuring.names import AUTO
from ..measuring.results import Row


class Ratio(NamedTuple):
    """How many times faster ours is than a peer, at one case."""

    ours: Row
    peer: Row

    @property
    def value(self) -> float:
        """t_peer / t_ours: above 1 ours is faster."""
        return self.peer["median_s"] / self.ours["median_s"]

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest ratio of times between p20 and p80 of both."""
        return self.peer["p20_s"] / self.ours["p80_s"], self.peer["p80_s"] / self.ours["p20_s"]


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in rows if row["status"] == "ok"]


def ranges_overlap(a: Row, b: Row) -> bool:
    """Whether the p20-p80 ranges of two times overlap, so that noise may explain a difference."""
    return bool(a["p20_s"] <= b["p80_s"] and b["p20_s"] <= a["p80_s"])


def milliseconds(row: Row, digits: int = 3) -> str:
    """The median of a row in ms; the suffix "+host" marks a time with host time in it."""
    return f"{row['median_s'] * 1e3:.{digits}f}" + (WITH_HOST if with_host(row) else "")


def with_host(row: Row) -> bool:
    """Whether a device's time includes time of the host."""
    return (row["timer"] or "").endswith(WITH_HOST)


def is_overhead(row: Row) -> bool:
    """Whether a row's case measures what a call costs in addition to its kernel."""
    return row["kernel"] == AUTO and row["m"] is not None and row["m"] * row["n"] <= 64 * 64


def ratios_to_peers(rows: Iterable[Row], charge: str) -> list[Ratio]:
    """ "auto" against every peer in each case, within one run and one device."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in timed(rows):
        if row["mode"] == "no_grad" and row["charge"] == charge and row["op"] != "roof":
            cases[row["run_id"], row["device"], row["case"]][row["kernel"]] = row
    return [
        Ratio(kernels[AUTO], row)
        for kernels in cases.values()
        if AUTO in kernels
        for row in kernels.values()
        if not is_ours(row)
    ]


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each device. Cases of one name on two devices are not comparable."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["device"]].append(row)
    return found


def is_ours(row: Row) -> bool:
    """Whether a row is of one of our kernels."""
    return family_of(row["kernel"]) not in peer_families()


def geomean(values: Iterable[float]) -> float:
    """The geometric mean of at least one positive value."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def mask_kind(mask: str) -> str:
    """The kind of a mask: uniform, real, or generated."""
    return mask if mask == "uniform" else "real" if mask.startswith("real:") else "generated"
