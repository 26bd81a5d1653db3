"""What the plots show, read off result rows; nothing here draws."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from bench import baselines, report
from bench.contender import FROM_TOKEN_MAJOR
from bench.results import Row

PRODUCTS = ("sddmm", "spmm")
TITLES = {"sddmm": "SDDMM", "spmm": "SpMM"}
CHARGE_NOTE = "token-major inputs, conversions paid"
# Real masks are at most 1536 x 576; larger ones are replicated.
_LARGE = 2**21
# The masks that get a column, uniform first; five fit a page.
_MASK_ORDER = ("uniform", "q_proj", "gate_proj", "v_proj", "down_proj")

Sweep = dict[tuple[str, str, str], dict[float, Row]]  # (op, mask, kernel) -> density -> row
Problem = tuple[str, int, int, int, float]  # mask, m, n, k, density


class RealPair(NamedTuple):
    """One op on a real mask and on a uniform mask of the same shape and density, by kernel."""

    label: str
    real: dict[str, Row]
    uniform: dict[str, Row]


def is_point(row: Row) -> bool:
    """Whether a row is a point of a curve: "auto" or a peer, from token-major."""
    return (
        row["op"] in PRODUCTS
        and row["charge"] == FROM_TOKEN_MAJOR
        and row["mode"] == "no_grad"
        and (row["kernel"] == report.OURS or not report.is_ours(row))
    )


def sweeps(rows: list[Row]) -> dict[tuple[int, int, int, str], Sweep]:
    """Rows over density at one shape and dtype, where at least three densities were measured."""
    found: dict[tuple[int, int, int, str], Sweep] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if is_point(row):
            shape = (row["m"], row["n"], row["k"], row["dtype"])
            found[shape][row["op"], row["mask"], row["kernel"]][row["density"]] = row
    return {
        shape: dict(sweep)
        for shape, sweep in found.items()
        if max(len(points) for points in sweep.values()) >= 3
    }


def masks(swept: Sweep) -> list[str]:
    """The masks with the longest curves, uniform first; five at most fit a page."""
    most = max(len(points) for points in swept.values())
    masks = {mask for (_, mask, _), points in swept.items() if len(points) == most}
    return [mask for mask in _MASK_ORDER if mask in masks]


def kernels(swept: Sweep) -> list[str]:
    """Peers, then ours, so that ours is drawn on top."""
    present = {kernel for _, _, kernel in swept}
    return [*(name for name in baselines.names() if name in present), report.OURS]


def any_row(swept: Sweep) -> Row:
    return next(iter(next(iter(swept.values())).values()))


def mask_title(mask: str) -> str:
    return "uniform mask" if mask == "uniform" else f"generated {mask} mask"


def shape(row: Row) -> str:
    return f"{row['m']}×{row['n']}, {row['k']} tokens"


def roof(rows: list[Row], kernel: str, work: str) -> float | None:
    for row in rows:
        if row["op"] == "roof" and row["kernel"] == kernel:
            return row[work] / row["median_s"]
    return None


def problem(row: Row) -> Problem:
    return row["mask"], row["m"], row["n"], row["k"], row["density"]


def problem_order(problem: Problem) -> tuple[object, ...]:
    mask, m, n, k, density = problem
    kind = ("uniform", "generated", "real").index(report.mask_kind(mask))
    return (m * n * k, k) if kind != 2 and m * n < _LARGE else (0, 0), kind, mask, k, m * n, density


def problem_label(problem: Problem) -> str:
    mask, m, n, k, density = problem
    return f"{mask.removeprefix('real:')}  {percent(density)}  {m}×{n}, {k} tokens"


def real_pairs(rows: list[Row]) -> dict[tuple[str, bool], list[RealPair]]:
    """Per op, and whether the masks are replicated ones: the pairs that were measured."""
    by_problem: dict[tuple[str, Problem], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if is_point(row):
            by_problem[row["op"], problem(row)][row["kernel"]] = row
    pairs: dict[tuple[str, bool], list[RealPair]] = defaultdict(list)
    for (op, (mask, m, n, k, density)), kernels in by_problem.items():
        uniform = by_problem.get((op, ("uniform", m, n, k, density)))
        if report.mask_kind(mask) == "real" and uniform:
            label = f"{mask.removeprefix('real:')}  {m}×{n}"
            pairs[op, m * n > _LARGE].append(RealPair(label, kernels, uniform))
    return dict(pairs)


def percent(value: float) -> str:
    """0.1 % for 0.001."""
    return f"{value * 100:.3g} %"
