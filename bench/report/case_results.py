"""The times of each case, from which ratios and targets are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..contenders import ours
from ..contenders.peers import family_of
from ..measuring.names import AUTO, FROM_TOKEN_MAJOR, OP, PRODUCTS
from ..measuring.results import Row
from .rows import is_ours, is_overhead, timed


@dataclass(frozen=True)
class CaseResult:
    """The times of one case of one run.

    Attributes:
        auto: the row of "auto", which a user gets by default. Its backend is the selected kernel.
        own: the rows of those of our kernels that "auto" may take, by name.
        peers: the row of the fastest peer of each family.
        roofs: the roof rows of the same run and device, by kernel.
    """

    auto: Row
    own: dict[str, Row]
    peers: dict[str, Row]
    roofs: dict[str, Row]

    def against(self, family: str) -> float | None:
        """t_peer / t_ours against the fastest of a family, or None if none was measured."""
        peer = self.peers.get(family)
        return None if peer is None else peer["median_s"] / self.auto["median_s"]

    def best_own(self) -> Row | None:
        """The fastest of our kernels, among those called by name."""
        return min(self.own.values(), key=lambda row: row["median_s"], default=None)


def case_results(rows: Iterable[Row]) -> list[CaseResult]:
    """All cases in which "auto" has a time. SDDMM and SpMM start from token-major operands."""
    roofs: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    cases: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in timed(rows):
        run = row["run_id"], row["device"]
        if row["op"] == "roof":
            roofs[run][row["kernel"]] = row
            continue
        charge = FROM_TOKEN_MAJOR if row["op"] in PRODUCTS else OP
        if row["mode"] == "no_grad" and row["charge"] == charge:
            cases[*run, row["case"]].append(row)
    found = []
    for (*run, _), entries in cases.items():
        result = _case_result(entries, roofs[tuple(run)])
        if result is not None:
            found.append(result)
    return found


def _case_result(rows: Sequence[Row], roofs: dict[str, Row]) -> CaseResult | None:
    auto = next((row for row in rows if row["kernel"] == AUTO), None)
    if auto is None or is_overhead(auto):
        return None
    own: dict[str, Row] = {}
    peers: dict[str, Row] = {}
    for row in rows:
        if not is_ours(row):
            family = family_of(row["kernel"])
            if family not in peers or row["median_s"] < peers[family]["median_s"]:
                peers[family] = row
        elif _by_name(row):
            own[row["backend"]] = row
    return CaseResult(auto, own, peers, roofs)


def _by_name(row: Row) -> bool:
    """Whether a row of ours is of a kernel, called by name, that "auto" might have taken.

    The oracle does not count: "auto" takes it only if there is no other kernel.
    """
    chosen = row["kernel"].startswith(AUTO)
    return (
        not chosen
        and row["kernel"] != "reference"
        and ours.auto_may_take(row["op"], row["backend"])
    )
