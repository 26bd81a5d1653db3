"""Real masks, compared with uniform masks of the same shape and density."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from ..measuring.names import AUTO, PRODUCTS
from ..measuring.results import Row
from . import rows as plot_rows
from . import style

# The two marks of a pair lie this far above and below its line, so that their ranges are apart.
_APART = 0.15


def real_vs_uniform(rows: list[Row], out: Path, name: str) -> list[Path]:
    """One line per real mask, comparing it with a uniform mask of the same shape and density.

    It shows ours and the fastest sparse peer on both masks.
    """
    pairs = plot_rows.real_pairs(rows)
    if not pairs:
        return []
    ops = [op for op in PRODUCTS if any(key[0] == op for key in pairs)]
    sizes = sorted({large for _, large in pairs})
    tallest = [max(len(pairs.get((op, large), ())) for op in ops) for large in sizes]
    sample = next(iter(pairs.values()))[0].real[AUTO]
    fig = style.figure(
        1.6 + 4.0 * len(ops),
        1.5 + sum(0.32 * count + 0.6 for count in tallest),
        f"Real masks and uniform masks of the same density, {sample['dtype']}",
        f"{sample['k']} tokens, {plot_rows.CHARGE_NOTE}; lines: {plot_rows.RANGE}",
        sample,
    )
    heights = [count + 1 for count in tallest]
    grid = fig.subplots(len(sizes), len(ops), squeeze=False, height_ratios=heights)
    for line, large in zip(grid, sizes, strict=True):
        for op, axes in zip(ops, line, strict=True):
            _pairs(axes, pairs.get((op, large), []))
            axes.set_title(f"{plot_rows.TITLES[op]}{', replicated masks' if large else ''}")
            if op != ops[0]:
                axes.set_yticklabels([])
    for axes in grid[-1]:
        axes.set_xlabel("GFLOP/s on the nonzeros")
    style.legend(fig)
    return style.save(fig, out, name)


def _pairs(axes: Axes, pairs: list[plot_rows.RealPair]) -> None:
    """Draw ours and the fastest sparse peer for each layer: real filled, uniform hollow."""
    seen: set[str] = set()
    for i, (_, real, uniform) in enumerate(pairs):
        sparse = [k for k in real if k in uniform and k not in (AUTO, "dense")]
        best = min(sparse, key=lambda k: real[k]["median_s"], default=None)
        for kernel, color, who in (
            (AUTO, style.OURS_COLOR, style.OURS_NAME),
            (best, "#6699CC", "fastest sparse peer"),
        ):
            if kernel is None or kernel not in real or kernel not in uniform:
                continue
            for row, y, face, what in (
                (real[kernel], i - _APART, color, "real mask"),
                (uniform[kernel], i + _APART, "white", "uniform mask"),
            ):
                label = f"{who}, {what}"
                value, low, high = (
                    row["flops"] / row[column] / 1e9 for column in ("median_s", "p80_s", "p20_s")
                )
                axes.hlines(y, low, high, color=color, linewidth=1.5, alpha=0.6, zorder=2)
                axes.plot(
                    [value],
                    [y],
                    "o",
                    markersize=5,
                    markerfacecolor=face,
                    markeredgecolor=color,
                    label=None if label in seen else label,
                    linestyle="none",
                    zorder=3,
                )
                seen.add(label)
    axes.set_yticks(range(len(pairs)), [label for label, _, _ in pairs], fontsize=8)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
