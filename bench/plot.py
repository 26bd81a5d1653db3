"""The plots of a run, drawn from its rows alone, as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from bench import baselines, plot_rows, report, style
from bench.contender import FROM_TOKEN_MAJOR
from bench.results import Row

# Mid tone at 1: orange where a peer is faster, blue where ours is; safe for colour-blind readers.
_DIVERGING = LinearSegmentedColormap.from_list("wins", ["#E66100", "#FBF7F2", "#2F6DA8"])


def draw_all(rows: list[Row], out: Path) -> list[Path]:
    """Every plot that the rows of one run have points for; returns the files written."""
    rows = report.timed(rows)
    written: list[Path] = []
    with style.context():
        for (m, n, k, dtype), swept in plot_rows.sweeps(rows).items():
            tag = f"{m}x{n}_k{k}_{dtype}"
            written += _time_vs_density(rows, swept, out, f"time_vs_density_{tag}")
            written += _memory_vs_density(swept, out, f"memory_vs_density_{tag}")
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["op"] in plot_rows.PRODUCTS):
            chosen = [row for row in rows if row["dtype"] == dtype]
            written += _speedup_heatmap(chosen, out, f"speedup_heatmap_{dtype}")
            written += _real_vs_uniform(chosen, out, f"real_vs_uniform_{dtype}")
    return written


def _time_vs_density(rows: list[Row], swept: plot_rows.Sweep, out: Path, name: str) -> list[Path]:
    ops = [op for op in plot_rows.PRODUCTS if any(key[0] == op for key in swept)]
    masks = plot_rows.masks(swept)
    sample = plot_rows.any_row(swept)
    fig = style.figure(
        0.6 + 4.2 * len(masks),
        0.9 + 3.3 * len(ops),
        "Time over density",
        f"{plot_rows.shape(sample)}, {sample['dtype']}, {plot_rows.CHARGE_NOTE}",
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
    fig.draw_without_rendering()  # the layout decides where the ends of lines are
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
        xs = [density for density, _ in points]
        ys = [row["median_s"] * 1e3 for _, row in points]
        look = style.look(kernel)
        axes.plot(xs, ys, **look)
        axes.fill_between(
            xs,
            [row["p20_s"] * 1e3 for _, row in points],
            [row["p80_s"] * 1e3 for _, row in points],
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
        ends.append((style.name_of(kernel), xs[-1], ys[-1], look["color"]))
        densities |= set(xs)
    style.plain_log(axes, "y")
    style.density_axis(axes, sorted(densities))
    xs = sorted(densities)
    dense = swept.get((op, mask, "dense"), {})
    if dense:
        typical = sorted(row["median_s"] for row in dense.values())[len(dense) // 2]
        ys = [typical * density * 1e3 for density in xs]
        axes.plot(xs, ys, color=style.INK, linestyle=(0, (5, 3)), linewidth=1, zorder=2)
        middle = len(xs) // 2
        _along(axes, xs[middle], ys[middle], "limit: dense × density")
    ours = swept.get((op, mask, report.OURS), {})
    if ours and bandwidth:
        floor = {density: row["bytes"] / bandwidth * 1e3 for density, row in ours.items()}
        axes.plot(
            sorted(floor),
            [floor[x] for x in sorted(floor)],
            color=style.FAINT,
            linestyle=":",
            linewidth=1.2,
            zorder=2,
        )
        last = max(floor)
        axes.annotate(
            "operands at copy bandwidth",
            (last, floor[last]),
            xytext=(0, -9),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color="#777777",
        )
    axes.margins(x=0.04)
    return ends


def _memory_vs_density(swept: plot_rows.Sweep, out: Path, name: str) -> list[Path]:
    points = [row for by_density in swept.values() for row in by_density.values()]
    if all(row["peak_bytes"] is None for row in points):
        return []
    ops = [op for op in plot_rows.PRODUCTS if any(key[0] == op for key in swept)]
    sample, mask = points[0], plot_rows.masks(swept)[0]
    fig = style.figure(
        0.6 + 4.4 * len(ops),
        4.4,
        "Peak memory of a call beyond its inputs",
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
    grid[0].set_ylabel("MB, its result included")
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
        look = style.look(kernel)
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
    axes.plot(xs, [least[x] for x in xs], color=style.INK, linestyle=(0, (5, 3)), linewidth=1)
    _along(axes, xs[len(xs) // 2], least[xs[len(xs) // 2]], "the result itself")
    if stated:
        # What the kernel says it allocates; the measured line above it is pages and threads.
        xs = sorted(stated)
        ys = [stated[x] for x in xs]
        axes.plot(xs, ys, color=style.OURS_COLOR, linestyle=":", linewidth=1.4, zorder=2)
        if ys[0] > 1.5 * least[xs[0]]:  # else it lies on the line that is labelled already
            _along(axes, xs[0], ys[0], "result + stated workspace")
    axes.margins(x=0.04)
    return ends


def _speedup_heatmap(rows: list[Row], out: Path, name: str) -> list[Path]:
    found = [r for r in report.ratios(rows, FROM_TOKEN_MAJOR) if r.ours["op"] in plot_rows.PRODUCTS]
    if not found:
        return []
    ops = [op for op in plot_rows.PRODUCTS if any(r.ours["op"] == op for r in found)]
    lines = list(dict.fromkeys(plot_rows.problem(r.ours) for r in found))
    lines.sort(key=plot_rows.problem_order)
    peers = {
        op: [
            peer
            for peer in baselines.names()
            if any(r.ours["op"] == op and r.peer["kernel"] == peer for r in found)
        ]
        for op in ops
    }
    sample = found[0].ours
    fig = style.figure(
        3.2 + 0.85 * sum(len(names) for names in peers.values()),
        1.3 + 0.235 * len(lines),
        f"How many times faster than each peer, {sample['dtype']}",
        f"{plot_rows.CHARGE_NOTE}; orange: the peer wins",
        sample,
    )
    widths = [len(peers[op]) for op in ops]
    grid = fig.subplots(1, len(ops), squeeze=False, sharey=True, width_ratios=widths)[0]
    norm = TwoSlopeNorm(0.0, -4.0, 4.0)  # log2: a factor of 16 either way
    for op, axes in zip(ops, grid, strict=True):
        table = {
            (plot_rows.problem(r.ours), r.peer["kernel"]): r.value
            for r in found
            if r.ours["op"] == op
        }
        for i, line in enumerate(lines):
            for j, peer in enumerate(peers[op]):
                value = table.get((line, peer))
                if value is not None:
                    _cell(axes, i, j, value, norm)
        axes.set_xlim(-0.5, len(peers[op]) - 0.5)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xticks(range(len(peers[op])), peers[op], fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks(
            range(len(lines)), [plot_rows.problem_label(line) for line in lines], fontsize=8
        )
        axes.tick_params(length=0)
        axes.set_title(plot_rows.TITLES[op])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return style.save(fig, out, name)


def _cell(axes: Axes, i: int, j: int, value: float, norm: TwoSlopeNorm) -> None:
    color = _DIVERGING(norm(min(max(math.log2(value), -4.0), 4.0)))
    axes.fill_between([j - 0.48, j + 0.48], i - 0.47, i + 0.47, color=color, linewidth=0)
    dark = value > 7 or value < 1 / 7
    axes.text(
        j,
        i,
        f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}",
        ha="center",
        va="center",
        fontsize=8,
        fontweight="bold" if value < 1 else "normal",
        color="white" if dark else style.INK,
    )


def _real_vs_uniform(rows: list[Row], out: Path, name: str) -> list[Path]:
    pairs = plot_rows.real_pairs(rows)
    if not pairs:
        return []
    ops = [op for op in plot_rows.PRODUCTS if any(key[0] == op for key in pairs)]
    sizes = sorted({large for _, large in pairs})
    tallest = [max(len(pairs.get((op, large), ())) for op in ops) for large in sizes]
    sample = next(iter(pairs.values()))[0].real[report.OURS]
    fig = style.figure(
        1.6 + 4.0 * len(ops),
        1.5 + sum(0.32 * count + 0.6 for count in tallest),
        f"Real masks and uniform masks of the same density, {sample['dtype']}",
        f"{sample['k']} tokens, {plot_rows.CHARGE_NOTE}",
        sample,
    )
    heights = [count + 1 for count in tallest]
    grid = fig.subplots(len(sizes), len(ops), squeeze=False, height_ratios=heights)
    for line, large in zip(grid, sizes, strict=True):
        for op, axes in zip(ops, line, strict=True):
            _dumbbells(axes, pairs.get((op, large), []))
            axes.set_title(f"{plot_rows.TITLES[op]}{', replicated masks' if large else ''}")
            if op != ops[0]:
                axes.set_yticklabels([])
    for axes in grid[-1]:
        axes.set_xlabel("GFLOP/s on the nonzeros")
    handles, labels = grid[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return style.save(fig, out, name)


def _dumbbells(axes: Axes, pairs: list[plot_rows.RealPair]) -> None:
    """Per layer: ours and the fastest sparse peer, real filled, uniform hollow."""
    seen: set[str] = set()
    for i, (_, real, uniform) in enumerate(pairs):
        sparse = [k for k in real if k in uniform and k not in (report.OURS, "dense")]
        best = min(sparse, key=lambda k: real[k]["median_s"], default=None)
        for kernel, color, who in (
            (report.OURS, style.OURS_COLOR, style.OURS_NAME),
            (best, "#6699CC", "fastest sparse peer"),
        ):
            if kernel is None or kernel not in real or kernel not in uniform:
                continue
            x, u = (row["flops"] / row["median_s"] / 1e9 for row in (real[kernel], uniform[kernel]))
            axes.plot([x, u], [i, i], color=color, linewidth=1.5, alpha=0.5, zorder=2)
            for value, face, what in ((x, color, "real mask"), (u, "white", "uniform mask")):
                label = f"{who}, {what}"
                axes.plot(
                    [value],
                    [i],
                    "o",
                    markersize=6,
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


def _along(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(3, -9),
        textcoords="offset points",
        fontsize=7,
        color="#555555",
    )
