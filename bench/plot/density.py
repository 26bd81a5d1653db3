"""Curves over density at one shape: time, memory, and our own kernels."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from ..measuring.names import AUTO, PRODUCTS
from ..measuring.results import Row
from . import rows as plot_rows
from . import style


def time_vs_density(
    rows: list[Row],
    swept: plot_rows.Sweep,
    out: Path,
    name: str,
    title: str = "Time over density",
) -> list[Path]:
    """One panel per op and mask. `rows` are all rows of the run, for its roofs."""
    ops = [op for op in PRODUCTS if any(key[0] == op for key in swept)]
    masks = plot_rows.masks(swept)
    sample = plot_rows.any_row(swept)
    fig = style.figure(
        0.6 + 4.2 * len(masks),
        0.9 + 3.3 * len(ops),
        title,
        f"{plot_rows.shape(sample)}, {sample['dtype']}, {plot_rows.CHARGE_NOTE}; "
        f"bands: {plot_rows.RANGE}",
        sample,
    )
    grid = fig.subplots(len(ops), len(masks), squeeze=False, sharex=True, sharey="row")
    bandwidth = plot_rows.roof(rows, "copy", "bytes")
    endings = []
    for op, line in zip(ops, grid, strict=True):
        for mask, axes in zip(masks, line, strict=True):
            endings.append((axes, _time_panel(axes, swept, op, mask, bandwidth)))
            axes.set_title(f"{plot_rows.TITLES[op]}, {plot_rows.mask_title(mask)}")
        line[0].set_ylabel("ms per call")
    for axes in grid[-1]:
        axes.set_xlabel("density")
    style.legend(fig)
    fig.draw_without_rendering()  # label_ends needs the final layout
    for axes, ends in endings:
        style.label_ends(axes, ends)
    return style.save(fig, out, name)


def _time_panel(
    axes: Axes, swept: plot_rows.Sweep, op: str, mask: str, bandwidth: float | None
) -> list[tuple[str, float, float, object]]:
    ends = []
    densities: set[float] = set()
    for kernel in plot_rows.kernels(swept):
        points = sorted(swept.get((op, mask, kernel), {}).items())
        if not points:
            continue
        look = style.line_style(kernel)
        style.curve(axes, points, 1e3, look)
        last, row = points[-1]
        ends.append((style.name_of(kernel), last, row["median_s"] * 1e3, look["color"]))
        densities |= {density for density, _ in points}
    style.plain_log(axes, "y")
    style.density_axis(axes, plot_rows.densities(swept))  # of all panels, which share the axis
    xs = sorted(densities)
    dense = swept.get((op, mask, "dense"), {})
    # A GPU has no such line: reading the operands takes longer than such a small part of the GEMM.
    if dense and next(iter(dense.values()))["device"] == "cpu":
        typical = sorted(row["median_s"] for row in dense.values())[len(dense) // 2]
        axes.plot(
            xs,
            [typical * density * 1e3 for density in xs],
            color=style.INK,
            linestyle=(0, (5, 3)),
            linewidth=1,
            zorder=2,
            label="limit: dense × density",
        )
    ours = swept.get((op, mask, AUTO), {})
    if ours and bandwidth:
        floor = {density: row["bytes"] / bandwidth * 1e3 for density, row in ours.items()}
        axes.plot(
            sorted(floor),
            [floor[x] for x in sorted(floor)],
            color=style.FAINT,
            linestyle=":",
            linewidth=1.2,
            zorder=2,
            label=plot_rows.AT_BANDWIDTH,
        )
    axes.margins(x=0.04)
    return ends


def memory_vs_density(swept: plot_rows.Sweep, out: Path, name: str) -> list[Path]:
    """One panel per op, for the first mask. Nothing if memory was not measured."""
    points = [row for by_density in swept.values() for row in by_density.values()]
    if all(row["peak_bytes"] is None for row in points):
        return []
    ops = [op for op in PRODUCTS if any(key[0] == op for key in swept)]
    sample, mask = points[0], plot_rows.masks(swept)[0]
    fig = style.figure(
        0.6 + 4.4 * len(ops),
        4.4,
        "Peak memory of a call, without its inputs",
        ", ".join(
            (
                plot_rows.shape(sample),
                sample["dtype"],
                plot_rows.mask_title(mask),
                plot_rows.CHARGE_NOTE,
            )
        ),
        sample,
    )
    grid = fig.subplots(1, len(ops), squeeze=False, sharey=True)[0]
    endings = []
    for op, axes in zip(ops, grid, strict=True):
        endings.append((axes, _memory_panel(axes, swept, op, mask)))
        axes.set_title(plot_rows.TITLES[op])
        axes.set_xlabel("density")
    grid[0].set_ylabel("MB, result included")
    style.legend(fig)
    fig.draw_without_rendering()
    for axes, ends in endings:
        style.label_ends(axes, ends)
    return style.save(fig, out, name)


def _memory_panel(
    axes: Axes, swept: plot_rows.Sweep, op: str, mask: str
) -> list[tuple[str, float, float, object]]:
    ends = []
    densities: set[float] = set()
    least: dict[float, float] = {}
    stated: dict[float, float] = {}
    for kernel in plot_rows.kernels(swept):
        points = sorted(swept.get((op, mask, kernel), {}).items())
        points = [(x, row) for x, row in points if row["peak_bytes"]]
        if not points:
            continue
        xs, ys = [x for x, _ in points], [row["peak_bytes"] / 1e6 for _, row in points]
        look = style.line_style(kernel)
        axes.plot(xs, ys, **look)
        ends.append((style.name_of(kernel), xs[-1], ys[-1], look["color"]))
        densities |= set(xs)
        least |= {x: row["output_bytes"] / 1e6 for x, row in points}
        stated |= {
            x: (row["output_bytes"] + row["workspace_bytes"]) / 1e6
            for x, row in points
            if row["workspace_bytes"] is not None
        }
    style.plain_log(axes, "y")
    style.density_axis(axes, sorted(densities))
    xs = sorted(least)
    axes.plot(
        xs,
        [least[x] for x in xs],
        color=style.INK,
        linestyle=(0, (5, 3)),
        linewidth=1,
        label="result only",
    )
    if stated:
        # The measured line adds pages and threads.
        xs = sorted(stated)
        axes.plot(
            xs,
            [stated[x] for x in xs],
            color=style.OURS_COLOR,
            linestyle=":",
            linewidth=1.4,
            zorder=2,
            label=f"result + workspace that {style.OURS_NAME} states",
        )
    axes.margins(x=0.04)
    return ends
