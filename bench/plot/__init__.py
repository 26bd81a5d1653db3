"""Draws the plots of a run from its rows only, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from ..measuring.names import PRODUCTS
from ..measuring.results import Row
from ..report import case_results, targets
from ..report import layer as layer_tables
from ..report.rows import by_device, timed
from . import density, gain, heatmap, layer, pairs, style, tokens
from . import rows as plot_rows


def draw_all(rows: list[Row], out: Path) -> list[Path]:
    """Draw every plot that the rows of one run have points for. Returns the files written."""
    written: list[Path] = []
    with style.context():
        for device, own in by_device(timed(rows)).items():
            if device == "cpu":
                written += _draw(own, plot_rows.sweeps(own), out, "")
            else:
                peers = plot_rows.fastest_of_families(own)
                sweeps = plot_rows.one_per_shape(plot_rows.sweeps(peers))
                written += _draw(peers, sweeps, out, f"_{device}")
                written += _draw_gpu(own, out, f"_{device}")
        written += _draw_layers(rows, out)
    return written


def _draw_layers(rows: list[Row], out: Path) -> list[Path]:
    """Draw layers in training: one figure per case and mode."""
    written: list[Path] = []
    for (_, device, case, mode), group in layer_tables.groups(rows).items():
        op, mask, shape, tokens_, _, dtype, _, *rest = case.replace(":", ".").split("/")
        name = "_".join((op, mask, shape, tokens_, dtype, *rest, mode))
        written += layer.bars(group, out, name + ("" if device == "cpu" else f"_{device}"))
    return written


def _draw(rows: list[Row], sweeps: plot_rows.Sweeps, out: Path, suffix: str) -> list[Path]:
    written: list[Path] = []
    for (m, n, k, dtype), swept in sweeps.items():
        tag = f"{m}x{n}_k{k}_{dtype}{suffix}"
        written += density.time_vs_density(rows, swept, out, f"time_vs_density_{tag}")
        written += density.memory_vs_density(swept, out, f"memory_vs_density_{tag}")
    for key, curves in plot_rows.token_curves(rows).items():
        op, m, n, share, dtype = key
        name = f"{op}_over_tokens_{m}x{n}_{share * 100:g}pc_{dtype}{suffix}"
        written += tokens.over_tokens(rows, key, curves, out, name)
    for dtype in dict.fromkeys(row["dtype"] for row in rows if row["op"] in PRODUCTS):
        chosen = [row for row in rows if row["dtype"] == dtype]
        written += heatmap.speedup_heatmap(chosen, out, f"speedup_heatmap_{dtype}{suffix}")
        lengths = plot_rows.tokens_of_real_masks(chosen)
        for k in lengths:
            tag = f"{dtype}_k{k}" if len(lengths) > 1 else dtype
            with_k = [row for row in chosen if row["k"] == k]
            written += pairs.real_vs_uniform(with_k, out, f"real_vs_uniform_{tag}{suffix}")
    return written


def _draw_gpu(rows: list[Row], out: Path, suffix: str) -> list[Path]:
    """Draw what only a GPU has: the gain over dense GEMM, and our kernels side by side."""
    written: list[Path] = []
    found = case_results.case_results(rows)
    for dtype, curves in plot_rows.speedups(found, targets.LEAST_SIZE).items():
        name = f"speedup_over_dense_{dtype}{suffix}"
        written += gain.speedup_over_dense(curves, dtype, found[0].auto, out, name)
    own = plot_rows.sweeps(plot_rows.own_kernels(rows), own=True)
    for (m, n, k, dtype), swept in plot_rows.one_per_shape(own).items():
        name = f"own_kernels_{m}x{n}_k{k}_{dtype}{suffix}"
        title = "Our kernels over density, and the choice of auto"
        written += density.time_vs_density(rows, swept, out, name, title)
    return written
