"""A table of every case against every peer, coloured by the ratio."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.patches import Rectangle

from ..contenders.peers import peer_families, peer_names
from ..measuring.names import FROM_TOKEN_MAJOR, PRODUCTS
from ..measuring.results import Row
from ..report.rows import Ratio, geomean, ratios_to_peers
from . import rows as plot_rows
from . import style

_MOST_LINES = 80  # lines that fill a page and a half
# A ratio is marked as rough if p20 and p80 of the two times leave more than this factor.
_NOISY = 2.0
# The middle colour is 1; orange means that a peer is faster, blue that ours is. Colour-blind
# readers can tell them apart.
_DIVERGING = LinearSegmentedColormap.from_list("wins", ["#E66100", "#FBF7F2", "#2F6DA8"])


def speedup_heatmap(rows: list[Row], out: Path, name: str) -> list[Path]:
    """One line per case, or per kind of case if there are too many cases."""
    found = [r for r in ratios_to_peers(rows, FROM_TOKEN_MAJOR) if r.ours["op"] in PRODUCTS]
    if not found:
        return []
    ops = [op for op in PRODUCTS if any(r.ours["op"] == op for r in found)]
    lines, line_of = plot_rows.lines(found, _MOST_LINES)
    peers = {
        op: [
            peer
            for peer in dict.fromkeys((*peer_names(), *peer_families()))
            if any(r.ours["op"] == op and r.peer["kernel"] == peer for r in found)
        ]
        for op in ops
    }
    pooled = "" if len(lines) == len({plot_rows.problem(r.ours) for r in found}) else "means; "
    sample = found[0].ours
    fig = style.figure(
        3.2 + 0.85 * sum(len(names) for names in peers.values()),
        1.3 + 0.235 * len(lines),
        f"How many times faster ours is than each peer, {sample['dtype']}",
        f"{plot_rows.CHARGE_NOTE}; {pooled}orange: the peer is faster; ~: the ratio varies twofold "
        "between p20 and p80 of the times; hollow: it may be 1",
        sample,
    )
    widths = [len(peers[op]) for op in ops]
    grid = fig.subplots(1, len(ops), squeeze=False, sharey=True, width_ratios=widths)[0]
    norm = TwoSlopeNorm(0.0, -4.0, 4.0)  # log2: a factor of 16 either way
    for op, axes in zip(ops, grid, strict=True):
        table: dict[tuple[str, str], list[Ratio]] = defaultdict(list)
        for r in found:
            if r.ours["op"] == op:
                table[line_of(r.ours), r.peer["kernel"]].append(r)
        for i, line in enumerate(lines):
            for j, peer in enumerate(peers[op]):
                if (line, peer) in table:
                    _cell(axes, i, j, table[line, peer], norm)
        axes.set_xlim(-0.5, len(peers[op]) - 0.5)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        names = [style.name_of(peer) for peer in peers[op]]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(lines)), lines, fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(plot_rows.TITLES[op])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return style.save(fig, out, name)


def _cell(axes: Axes, i: int, j: int, found: list[Ratio], norm: TwoSlopeNorm) -> None:
    value = geomean(r.value for r in found)
    low, high = (geomean(ends) for ends in zip(*(r.range for r in found), strict=True))
    color = _DIVERGING(norm(min(max(math.log2(value), -4.0), 4.0)))
    hollow = low <= 1 <= high
    axes.add_patch(
        Rectangle(
            (j - 0.47, i - 0.43),
            0.94,
            0.86,
            facecolor="white" if hollow else color,
            edgecolor=color,
            linewidth=1.2,
        )
    )
    dark = not hollow and (value > 7 or value < 1 / 7)
    digits = f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    axes.text(
        j,
        i,
        f"~{digits}" if high > _NOISY * low else digits,
        ha="center",
        va="center",
        fontsize=8,
        fontweight="bold" if value < 1 else "normal",
        color="white" if dark else style.INK,
    )
