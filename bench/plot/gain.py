"""SDDMM's gain over dense GEMM + gather, which is the peer to beat on a GPU."""

from __future__ import annotations

from pathlib import Path

from ..measuring.results import Row
from ..report.rows import geomean
from . import rows as plot_rows
from . import style

_KINDS = {
    "generated": (style.OURS_COLOR, "o", "generated masks"),
    "real": ("#882255", "D", "real masks, replicated"),
    "uniform": ("#0072B2", "s", "uniform masks"),
    "peers": (style.FAINT, "x", "fastest sparse peer, generated masks"),
}


def speedup_over_dense(
    curves: plot_rows.Speedups, dtype: str, sample: Row, out: Path, name: str
) -> list[Path]:
    """One panel per number of tokens, one line per kind of mask."""
    tokens = list(curves)
    fig = style.figure(
        0.9 + 3.6 * len(tokens),
        4.6,
        f"SDDMM: times faster than dense GEMM + gather, {dtype}",
        f"4032×4032 and larger, {plot_rows.CHARGE_NOTE}; line: geometric mean, band: all masks",
        sample,
    )
    grid = fig.subplots(1, len(tokens), squeeze=False, sharey=True)[0]
    for k, axes in zip(tokens, grid, strict=True):
        densities: set[float] = set()
        for kind, by_density in curves[k].items():
            color, marker, label = _KINDS[kind]
            xs = sorted(by_density)
            means = [geomean(by_density[x]) for x in xs]
            line = "none" if len(xs) == 1 else "-"
            axes.plot(xs, means, color=color, marker=marker, linestyle=line, label=label)
            low, high = ([pick(by_density[x]) for x in xs] for pick in (min, max))
            if len(xs) == 1:
                axes.vlines(xs, low, high, color=color, alpha=0.4)
            else:
                axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
            densities |= set(xs)
        axes.axhline(1, color=style.INK, linestyle=(0, (5, 3)), linewidth=1)
        style.plain_log(axes, "y")
        style.density_axis(axes, sorted(densities))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{k} tokens")
        axes.set_xlabel("density")
    grid[0].set_ylabel("t(dense GEMM + gather) / t")
    style.legend(fig)
    return style.save(fig, out, name)
