"""The data of the plots, taken from result rows. Nothing here draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..contenders.peers import family_of, peer_families, peer_names
from ..measuring.names import AUTO, FROM_TOKEN_MAJOR, PRODUCTS
from ..measuring.results import Row
from ..report import ratios
from ..report.case_results import CaseResult
from ..report.rows import Ratio, is_ours, mask_kind

TITLES = {"sddmm": "SDDMM", "spmm": "SpMM"}
CHARGE_NOTE = "token-major inputs, conversions timed"
RANGE = "p20 to p80 of the times"
AT_BANDWIDTH = "operands at copy bandwidth"
# Real masks are at most 1536 x 576; larger ones are replicated.
_LARGE = 2**21
# The least number of points of a curve over density, and of one over tokens.
_CURVE, _LONG_CURVE = 3, 5
# The masks that have a column of panels, uniform first. Five columns fit a page.
_MASK_ORDER = ("uniform", "q_proj", "gate_proj", "v_proj", "down_proj")

Sweep = dict[tuple[str, str, str], dict[float, Row]]  # (op, mask, kernel) -> density -> row
Sweeps = dict[tuple[int, int, int, str], Sweep]  # (m, n, k, dtype) -> what was swept
Problem = tuple[str, int, int, int, float]  # mask, m, n, k, density
# mask -> kernel -> tokens -> row
TokenCurves = dict[str, dict[str, dict[int, Row]]]
# tokens -> what -> density -> values
Speedups = dict[int, dict[str, dict[float, list[float]]]]


class RealPair(NamedTuple):
    """One op on a real mask and on a uniform mask of its shape and density, by kernel."""

    label: str
    real: dict[str, Row]
    uniform: dict[str, Row]


def is_point(row: Row) -> bool:
    """Whether a row is a point of a curve: "auto" or a peer, from token-major operands."""
    return (
        row["op"] in PRODUCTS
        and row["charge"] == FROM_TOKEN_MAJOR
        and row["mode"] == "no_grad"
        and (row["kernel"] == AUTO or not is_ours(row))
    )


def sweeps(rows: list[Row], own: bool = False) -> Sweeps:
    """Rows over density at one shape and dtype, if enough densities were measured for a curve.

    They are the rows of "auto" and the peers; with `own`, all rows given.
    """
    found: dict[tuple[int, int, int, str], Sweep] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if own or is_point(row):
            shape = (row["m"], row["n"], row["k"], row["dtype"])
            found[shape][row["op"], row["mask"], row["kernel"]][row["density"]] = row
    return {shape: dict(sweep) for shape, sweep in found.items() if masks(sweep)}


def one_per_shape(found: Sweeps) -> Sweeps:
    """The sweep with the most points for each matrix shape and dtype; of equals, the first.

    A GPU is measured at so many numbers of tokens that nobody looks at a curve of each.
    """
    best: dict[tuple[int, int, str], tuple[int, int, int, str]] = {}
    for key, swept in found.items():
        matrix = (key[0], key[1], key[3])
        if matrix not in best or _points(swept) > _points(found[best[matrix]]):
            best[matrix] = key
    return {key: found[key] for key in best.values()}


def _points(swept: Sweep) -> int:
    return sum(len(points) for points in swept.values())


def masks(swept: Sweep) -> list[str]:
    """The masks with enough points for a curve, uniform first. At most five fit a page."""
    masks = {mask for (_, mask, _), points in swept.items() if len(points) >= _CURVE}
    return [mask for mask in _MASK_ORDER if mask in masks]


def densities(swept: Sweep) -> list[float]:
    """All densities of a sweep."""
    return sorted({density for points in swept.values() for density in points})


def kernels(swept: Sweep) -> list[str]:
    """The kernels of a sweep: peers first, then ours, so that ours is drawn on top."""
    return drawn({kernel for _, _, kernel in swept})


def drawn(present: Iterable[str]) -> list[str]:
    """Kernels in the order in which they are drawn."""
    present = set(present)
    known = dict.fromkeys((*peer_names(), *peer_families()))
    own = sorted(present - known.keys() - {AUTO})
    return [*(name for name in known if name in present), *own, AUTO]


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
    kind = ("uniform", "generated", "real").index(mask_kind(mask))
    return (m * n * k, k) if kind != 2 and m * n < _LARGE else (0, 0), kind, mask, k, m * n, density


def problem_label(problem: Problem) -> str:
    mask, m, n, k, density = problem
    return f"{mask.removeprefix('real:')}  {percent(density)}  {m}×{n}, {k} tokens"


def lines(found: list[Ratio], most: int) -> tuple[list[str], Callable[[Row], str]]:
    """The lines of a table of ratios, in order, and a function from a row to its line.

    There is a line per problem. If that gives more than `most` lines, there is one per kind of
    mask, density band and number of tokens.
    """
    labels = {problem(r.ours): problem_label(problem(r.ours)) for r in found}
    ordered = [labels[key] for key in sorted(labels, key=problem_order)]
    if len(ordered) <= most:
        return ordered, lambda row: labels[problem(row)]

    def group(row: Row) -> str:
        kind = mask_kind(row["mask"])
        return f"{kind}  {ratios.band(row['density'])}, {row['k']} tokens"

    groups: dict[str, tuple[object, ...]] = {}
    for r in found:
        order = (mask_kind(r.ours["mask"]), r.ours["k"], r.ours["density"])
        name = group(r.ours)
        groups[name] = min(groups.get(name, order), order)
    return sorted(groups, key=lambda name: groups[name]), group


def real_pairs(rows: list[Row]) -> dict[tuple[str, bool], list[RealPair]]:
    """The pairs that were measured, by op and by whether their masks are replicated."""
    by_problem: dict[tuple[str, Problem], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if is_point(row):
            by_problem[row["op"], problem(row)][row["kernel"]] = row
    pairs: dict[tuple[str, bool], list[RealPair]] = defaultdict(list)
    for (op, (mask, m, n, k, density)), kernels in by_problem.items():
        uniform = by_problem.get((op, ("uniform", m, n, k, density)))
        if mask_kind(mask) == "real" and uniform:
            label = f"{mask.removeprefix('real:')}  {m}×{n}"
            pairs[op, m * n > _LARGE].append(RealPair(label, kernels, uniform))
    return dict(pairs)


def tokens_of_real_masks(rows: list[Row]) -> list[int]:
    """The numbers of tokens at which real masks were measured."""
    real = (row for row in rows if is_point(row) and mask_kind(row["mask"]) == "real")
    return sorted({row["k"] for row in real})


def percent(value: float) -> str:
    """A share as text: 0.1 % for 0.001."""
    return f"{value * 100:.3g} %"


def fastest_of_families(rows: list[Row]) -> list[Row]:
    """The fastest row of each family of peers in each case, under the family's name.

    Our rows and the roofs are kept. A GPU has so many peers that their curves would hide each
    other.
    """
    kept: list[Row] = []
    best: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if is_ours(row) or row["op"] == "roof":
            kept.append(row)
            continue
        family = family_of(row["kernel"])
        key = (row["run_id"], row["case"], row["charge"], family)
        if key not in best or row["median_s"] < best[key]["median_s"]:
            best[key] = row | {"kernel": family}
    return kept + list(best.values())


def own_kernels(rows: list[Row]) -> list[Row]:
    """Rows of our kernels only, as points of curves beside "auto"."""
    return [
        row
        for row in rows
        if row["op"] in PRODUCTS
        and row["charge"] == FROM_TOKEN_MAJOR
        and row["mode"] == "no_grad"
        and is_ours(row)
    ]


def token_curves(rows: list[Row]) -> dict[tuple[str, int, int, float, str], TokenCurves]:
    """Rows over the number of tokens, by (op, m, n, density, dtype)."""
    found: dict[tuple[str, int, int, float, str], TokenCurves] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for row in rows:
        if is_point(row) and mask_kind(row["mask"]) != "real":
            key = (row["op"], row["m"], row["n"], row["density"], row["dtype"])
            found[key][row["mask"]][row["kernel"]][row["k"]] = row
    curves = {}
    for key, by_mask in found.items():
        long = {m: c for m, c in by_mask.items() if len(c.get(AUTO, ())) >= _LONG_CURVE}
        if long:
            curves[key] = long
    return curves


def speedups(found: Iterable[CaseResult], least_size: int) -> dict[str, Speedups]:
    """SDDMM's ratios to dense + gather on large masks, by dtype, tokens, kind and density.

    The kinds are "uniform", "generated", "real", and "peers". The last is the fastest sparse peer
    on generated masks.
    """
    curves: dict[str, Speedups] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    for result in found:
        row, dense = result.auto, result.peers.get("dense")
        if row["op"] != "sddmm" or dense is None or row["m"] * row["n"] < least_size:
            continue
        kind = mask_kind(row["mask"])
        at = curves[row["dtype"]][row["k"]]
        # Real masks and the uniform masks of the same density differ in density by a thousandth.
        density = float(f"{row['density']:.2g}")
        at[kind][density].append(dense["median_s"] / row["median_s"])
        sparse = [r["median_s"] for family, r in result.peers.items() if family != "dense"]
        if kind == "generated" and sparse:
            at["peers"][density].append(dense["median_s"] / min(sparse))
    return {
        dtype: {k: at for k, at in sorted(by_tokens.items()) if _has_curve(at)}
        for dtype, by_tokens in curves.items()
        if any(map(_has_curve, by_tokens.values()))
    }


def _has_curve(at: dict[str, dict[float, list[float]]]) -> bool:
    return any(len(by_density) >= _CURVE for by_density in at.values())
