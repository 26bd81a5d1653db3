"""How many times faster "auto" is than each family of peers and than our own kernels.

Cases are grouped by kind. The rows of several runs may be taken together, but every ratio is within
one case of one run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rosa_train.cli.tables import Table

from ..contenders.peers import peer_families
from ..measuring.clocks import WITH_HOST
from ..measuring.names import AUTO, OP, PRODUCTS
from ..measuring.results import Row
from . import targets
from .case_results import CaseResult, case_results
from .rows import geomean, mask_kind, milliseconds, with_host

_GROUP = "device, op, dtype, masks, density, tokens"
# Upper ends of the density bands that cases are grouped by.
_BANDS = (0.002, 0.0045, 0.008, 0.015, 0.03, 1.0)
# "auto" took the wrong kernel if it is slower than another of ours by more than this.
_WRONG = 1.05
# The longest line about cases without a time, in characters.
_WIDEST = 120


def band(density: float) -> str:
    """The density band that a case is counted in, as text."""
    last = _band(density)
    low, high = _BANDS[last - 1] * 100, _BANDS[last] * 100
    if last == 0:
        return f"< {high:g} %"
    return f">= {low:g} %" if last == len(_BANDS) - 1 else f"{low:g}-{high:g} %"


def _band(density: float) -> int:
    return next(i for i, high in enumerate(_BANDS) if density <= high)


def short_table(rows: Iterable[Row]) -> Table:
    """What "auto" took, and how many times faster it is than the peers.

    SDDMM has a line per mask. The other ops have a line per number of tokens, with geometric means.
    """
    table = Table(
        "How many times faster auto is than dense (+ gather for SDDMM), cuSPARSE, and the fastest "
        "other peer",
        ["case", "auto took", "ms", "x dense", "x cuSPARSE", "x other", "fastest own", "ms"],
    )
    found = case_results(rows)
    sddmm = [result for result in found if result.auto["op"] == "sddmm"]
    for result in sddmm:
        row, best = result.auto, result.best_own()
        table.rows.append(
            [
                f"sddmm {row['mask']} {row['m']}x{row['n']} k{row['k']}",
                row["backend"],
                milliseconds(row),
                *(_against([result], peer) for peer in ("dense", "cusparse")),
                _against_others([result]),
                *(("-", "-") if best is None else (best["backend"], milliseconds(best))),
            ]
        )
    masked = [result for result in sddmm if mask_kind(result.auto["mask"]) == "real"]
    groups: dict[str, list[CaseResult]] = {
        f"geometric mean: sddmm, {len(masked)} real masks": masked
    }
    for result in found:
        row = result.auto
        if row["op"] != "sddmm":
            what = f" {mask_kind(row['mask'])} k{row['k']}" if row["op"] in PRODUCTS else ""
            groups.setdefault(f"geometric mean: {row['op']}{what}", []).append(result)
    for what, members in groups.items():
        if members:
            taken = _counts(Counter(result.auto["backend"] for result in members))
            cells = [_against(members, peer) for peer in ("dense", "cusparse")]
            mean = f"{geomean(result.auto['median_s'] for result in members) * 1e3:.3f}"
            table.rows.append([what, taken, mean, *cells, _against_others(members), "", ""])
    return table


def untimed(rows: Iterable[Row]) -> list[str]:
    """Lines about the cases in which "auto" has no time, with the reason.

    Cases that were not run are counted together.
    """
    found: Counter[str] = Counter()
    for row in rows:
        if row["kernel"] == AUTO and row["status"] != "ok" and row["charge"] == OP:
            whose = "" if row["reason"].startswith("not run") else f"{row['case']}: "
            found[f"{whose}{row['status']}, {row['reason']}"[:_WIDEST]] += 1
    return [f"auto was not timed, {count} x: {reason}" for reason, count in found.items()]


def _against(members: Sequence[CaseResult], family: str) -> str:
    """The geometric mean against a family of peers; "+host" marks times with host time in them."""
    ratios = [ratio for result in members if (ratio := result.against(family)) is not None]
    if not ratios:
        return "-"
    host = any(with_host(result.peers[family]) for result in members if family in result.peers)
    return f"{geomean(ratios):.2f}" + (WITH_HOST if host else "")


def _against_others(members: Sequence[CaseResult]) -> str:
    """The smallest ratio to a family other than dense and cuSPARSE, and this family's name."""
    families = {family for result in members for family in result.peers} - {"dense", "cusparse"}
    means = {
        family: geomean(result.against(family) for result in members if family in result.peers)
        for family in families
    }
    if not means:
        return "-"
    family = min(means, key=lambda name: means[name])
    return f"{_against(members, family)} {family}"


def tables(rows: Iterable[Row], limit: int | None = None) -> list[Table]:
    """Ratios to peers and to our own kernels, the wrong choices of "auto", and the targets."""
    found = case_results(rows)
    made = [
        peers_table(found),
        own_table(found),
        choices_table(found, limit),
        targets.table(found),
    ]
    return [table for table in made if table.rows]


def peers_table(found: Sequence[CaseResult]) -> Table:
    """Geometric mean and worst case against the fastest of each family."""
    families = [
        family for family in peer_families() if any(family in result.peers for result in found)
    ]
    table = Table(
        "How many times faster auto is than the best peer of each family: geometric mean (worst)",
        [_GROUP, "cases", *families],
    )
    for group, members in _grouped(found):
        cells = [
            _spread([result.against(family) for result in members], min) for family in families
        ]
        table.rows.append([group, str(len(members)), *cells])
    return table


def own_table(found: Sequence[CaseResult]) -> Table:
    """How much slower "auto" is than the fastest of our kernels, and which kernels these were."""
    table = Table(
        "auto against the best of our own kernels: how many times slower, geometric mean (worst)",
        [_GROUP, "cases", "slower", "auto took", "fastest own"],
    )
    for group, members in _grouped([result for result in found if result.own]):
        slower = [result.auto["median_s"] / result.best_own()["median_s"] for result in members]
        taken = Counter(result.auto["backend"] for result in members)
        best = Counter(result.best_own()["backend"] for result in members)
        table.rows.append(
            [group, str(len(members)), _spread(slower, max), _counts(taken), _counts(best)]
        )
    return table


def choices_table(found: Sequence[CaseResult], limit: int | None = None) -> Table:
    """The cases in which "auto" should have taken another of our kernels, worst first."""
    wrong = []
    for result in found:
        best = result.best_own()
        if best is not None and best["backend"] != result.auto["backend"]:
            factor = result.auto["median_s"] / best["median_s"]
            if factor > _WRONG:
                wrong.append((factor, result.auto, best))
    wrong.sort(key=lambda entry: -entry[0])
    shown = wrong[:limit]
    more = f"; here the worst {len(shown)}, `ratios` shows all" if len(shown) < len(wrong) else ""
    table = Table(
        f"auto should have taken another of our kernels: {len(wrong)} of {len(found)} cases{more}",
        ["case", "took", "ms", "better", "ms", "slower"],
    )
    for factor, auto, best in shown:
        cells = [(row["backend"], milliseconds(row)) for row in (auto, best)]
        table.rows.append([auto["case"], *cells[0], *cells[1], f"{factor:.2f}"])
    return table


def _grouped(found: Iterable[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    groups: dict[tuple[Any, ...], list[CaseResult]] = defaultdict(list)
    for result in found:
        row = result.auto
        what = (row["device"], row["op"], row["dtype"], mask_kind(row["mask"]))
        groups[*what, _band(row["density"]), row["k"]].append(result)
    named = []
    for key in sorted(groups):
        row = groups[key][0].auto
        tokens = f"{row['k']}" if row["op"] in PRODUCTS else "-"
        parts = (*key[:4], band(row["density"]), tokens)
        named.append((", ".join(parts), groups[key]))
    return named


def _spread(values: Sequence[float | None], worst: Callable[[list[float]], float]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    return f"{geomean(present):.2f} ({worst(present):.2f})"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())
