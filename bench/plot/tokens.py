"""Curves over the number of tokens, from decoding to training."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from ..measuring.names import AUTO
from ..measuring.results import Row
from . import rows as plot_rows
from . import style


def over_tokens(
    rows: list[Row],
    key: tuple[str, int, int, float, str],
    curves: plot_rows.TokenCurves,
    out: Path,
    name: str,
) -> list[Path]:
    """One panel per mask. `rows` are all rows of the run, for its roofs."""
    op, m, n, share, dtype = key
    sample = next(iter(curves[next(iter(curves))][AUTO].values()))
    fig = style.figure(
        1.2 + 4.2 * len(curves),
        4.2,
        f"{plot_rows.TITLES[op]} over the number of tokens",
        f"{m}×{n}, {plot_rows.percent(share)}, {dtype}, {plot_rows.CHARGE_NOTE}; "
        f"bands: {plot_rows.RANGE}",
        sample,
    )
    grid = fig.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    bandwidth = plot_rows.roof(rows, "copy", "bytes")
    endings = []
    for (mask, by_kernel), axes in zip(curves.items(), grid, strict=True):
        endings.append((axes, _token_panel(axes, by_kernel, bandwidth)))
        axes.set_title(plot_rows.mask_title(mask))
        axes.set_xlabel("tokens")
    grid[0].set_ylabel("us per call")
    style.legend(fig)
    fig.draw_without_rendering()  # label_ends needs the final layout
    for axes, ends in endings:
        style.label_ends(axes, ends)
    return style.save(fig, out, name)


def _token_panel(
    axes: Axes, by_kernel: dict[str, dict[int, Row]], bandwidth: float | None
) -> list[tuple[str, float, float, object]]:
    ends = []
    for kernel in plot_rows.drawn(by_kernel):
        points = sorted(by_kernel[kernel].items())
        look = style.line_style(kernel)
        style.curve(axes, points, 1e6, look)
        last, row = points[-1]
        ends.append((style.name_of(kernel), last, row["median_s"] * 1e6, look["color"]))
    ours = sorted(by_kernel[AUTO].items())
    if bandwidth is not None:
        floor = [row["bytes"] / bandwidth * 1e6 for _, row in ours]
        axes.plot(
            [k for k, _ in ours],
            floor,
            color=style.FAINT,
            linestyle=":",
            linewidth=1.2,
            label=plot_rows.AT_BANDWIDTH,
        )
    axes.set_xscale("log", base=2)
    style.plain_log(axes, "y")
    axes.set_xticks([k for k, _ in ours], [str(k) for k, _ in ours], fontsize=7)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.04)
    return ends
