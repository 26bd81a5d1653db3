"""The speed targets on one GPU, and whether the rows reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rosa_train.cli.tables import Table

from ..measuring.results import Row
from .case_results import CaseResult
from .rows import geomean, mask_kind

_TOKENS = (2048, 8192, 16384)
# About 4096 x 4096 and larger: real masks are replicated to multiples of their own size, 4032 x
# 4032.
LEAST_SIZE = 4000 * 4000
_SECTOR = 32  # bytes that DRAM and L2 deliver at a time


@dataclass(frozen=True)
class Target:
    """A ratio to reach over some cases.

    Attributes:
        what: the target in words.
        least: the least value to reach.
        applies: whether the target applies to a case, by its "auto" row.
        ratio: a case's ratio (higher is better), or None if it was not measured.
        every: whether every case must reach `least`, not only the geometric mean.
    """

    what: str
    least: float
    applies: Callable[[Row], bool]
    ratio: Callable[[CaseResult], float | None]
    every: bool = False


def table(found: Sequence[CaseResult]) -> Table:
    """Every target: reached, missed or not measured. Empty without rows of a GPU."""
    made = Table(
        "Targets on one GPU", ["target", "to reach", "geometric mean (worst)", "cases", "verdict"]
    )
    cuda = [result for result in found if result.auto["device"] == "cuda"]
    if not cuda:
        return made
    for target in TARGETS:
        ratios = [target.ratio(result) for result in cuda if target.applies(result.auto)]
        measured = [ratio for ratio in ratios if ratio is not None]
        how = "every case" if target.every else "mean"
        cells = [target.what, f"{how} {target.least:g}"]
        if measured:
            mean, worst = geomean(measured), min(measured)
            reached = (worst if target.every else mean) >= target.least
            cells += [f"{mean:.2f} ({worst:.2f})", str(len(measured))]
            cells.append("reached" if reached else "missed")
        else:
            cells += ["-", "0", "not measured"]
        made.rows.append(cells)
    return made


def _sddmm(*kinds: str) -> Callable[[Row], bool]:
    """bfloat16 SDDMM at model shapes on masks of some kinds."""

    def applies(row: Row) -> bool:
        kind = mask_kind(row["mask"])
        return (
            (row["op"], row["dtype"]) == ("sddmm", "bfloat16")
            and row["k"] in _TOKENS
            and row["m"] * row["n"] >= LEAST_SIZE
            and kind in kinds
            and (kind == "uniform" or 0.0029 < row["density"] < 0.0201)
        )

    return applies


def _decoding(row: Row) -> bool:
    return row["op"] == "spmm" and row["k"] <= 64 and row["m"] * row["n"] >= LEAST_SIZE


def _csr_add(row: Row) -> bool:
    return row["op"] == "csr_add_"


def _uniform_csr_add(row: Row) -> bool:
    return row["op"] == "csr_add_" and row["mask"] == "uniform"


def _against(family: str) -> Callable[[CaseResult], float | None]:
    return lambda result: result.against(family)


def _against_all(result: CaseResult) -> float | None:
    ratios = [result.against(family) for family in result.peers]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def scattered_floor_s(row: Row, copy: Row) -> float:
    """Seconds that the scattered sectors of a uniform csr_add_ take at copy bandwidth.

    Every sector with an entry is read and written back. The column and value of each entry are
    read.
    """
    size = {"float32": 4}.get(row["dtype"], 2)
    per_sector = _SECTOR // size
    sectors = row["m"] * row["n"] / per_sector
    touched = sectors * (1 - (1 - row["density"]) ** per_sector)
    traffic = 2 * _SECTOR * touched + row["nnz"] * (4 + size) + 4 * (row["m"] + 1)
    return traffic * copy["median_s"] / copy["bytes"]


def _against_floor(result: CaseResult) -> float | None:
    copy = result.roofs.get("copy")
    return None if copy is None else scattered_floor_s(result.auto, copy) / result.auto["median_s"]


_REAL_LIKE = ("generated", "real")
TARGETS = (
    Target(
        "SDDMM, generated masks, 0.3-2 %: x dense + gather",
        3.0,
        _sddmm("generated"),
        _against("dense"),
    ),
    Target(
        "SDDMM, replicated real masks: x dense + gather", 4.0, _sddmm("real"), _against("dense")
    ),
    Target(
        "SDDMM, real-like masks: x Sputnik-style",
        8.0,
        _sddmm(*_REAL_LIKE),
        _against("sputnik_style"),
    ),
    Target("SDDMM, real-like masks: x spops", 8.0, _sddmm(*_REAL_LIKE), _against("spops")),
    Target("SDDMM, real-like masks: x cuSPARSE", 8.0, _sddmm(*_REAL_LIKE), _against("cusparse")),
    Target(
        "SDDMM, uniform masks: x the fastest peer",
        1 / 1.05,
        _sddmm("uniform"),
        _against_all,
        every=True,
    ),
    Target("SpMM, 1-64 tokens: x cuSPARSE", 2.0, _decoding, _against("cusparse")),
    Target("SpMM, 1-64 tokens: x Sputnik-style", 2.0, _decoding, _against("sputnik_style")),
    Target("csr_add_: x spops, which clones the weight", 5.0, _csr_add, _against("spops")),
    Target(
        "csr_add_, uniform masks: share of copy bandwidth, counting the 32-byte sectors",
        0.8,
        _uniform_csr_add,
        _against_floor,
    ),
)
