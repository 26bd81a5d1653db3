"""The style of the plots: a strong colour for ours, muted colour-blind-safe ones for peers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..contenders.peers import family_of
from ..measuring.results import Row
from . import rows as plot_rows

OURS_COLOR, INK, FAINT = "#D55E00", "#333333", "#999999"
# Muted colours of Paul Tol's colour-blind-safe sets. Markers tell the peers apart in grey too.
_PEERS = {
    "dense": ("#555555", "s"),
    "torch": ("#6699CC", "^"),
    "torch-csc": ("#332288", "v"),
    "cusparse": ("#882255", "P"),
    "sputnik_style": ("#CCBB44", "X"),
    "scipy": ("#997700", "D"),
    "numpy": ("#997700", "D"),
    "spops": ("#44AA99", "o"),
}
# Our kernels, drawn beside "auto", by the last part of their names.
_OWN = {
    "gather": ("#0072B2", "v"),
    "tile": ("#009E73", "s"),
    "wgmma": ("#CC79A7", "D"),
    "dense": ("#555555", "P"),
}
OURS_NAME = "rosa-kernels"

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: a tenth of the size, and it can be searched
    "svg.hashsalt": "rosa-kernels",  # the same rows give the same file
}


def line_style(kernel: str) -> dict[str, Any]:
    """Colour, marker and weight of a contender's line."""
    if kernel == "auto":
        return {"color": OURS_COLOR, "marker": "o", "linewidth": 2.6, "markersize": 6, "zorder": 5}
    peer = _PEERS.get(kernel) or _PEERS.get(family_of(kernel))
    color, marker = peer or _OWN.get(kernel.replace("-", "/").split("/")[-1], (FAINT, "x"))
    return {"color": color, "marker": marker, "linewidth": 1.3, "markersize": 4, "zorder": 3}


def name_of(kernel: str) -> str:
    """The name of a contender in plots."""
    return OURS_NAME if kernel == "auto" else kernel.replace("_", "-")


def context() -> AbstractContextManager[None]:
    """The context for all drawing. It isolates the plots from the user's matplotlib settings."""
    return mpl.rc_context({**mpl.rcParamsDefault, **_RC})


def figure(width: float, height: float, title: str, note: str, row: Row) -> Figure:
    """An empty figure with a bold title; the line below has the note and the machine."""
    width = max(width, 7.5)  # or the note would not fit
    # Two lines of text at fixed height, whatever the height of the figure.
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - 0.62 / height), w_pad=0.08, h_pad=0.08)
    fig = Figure(figsize=(width, height), layout=engine)
    FigureCanvasAgg(fig)
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    machine = f"{row['device_name']}{threads}, torch {row['torch']}, {row['utc'][:10]}"
    left = 0.1 / width
    fig.text(left, 1 - 0.1 / height, title, va="top", fontsize=13, fontweight="bold")
    fig.text(left, 1 - 0.36 / height, f"{note}. {machine}.", va="top", color="#666666")
    return fig


def save(fig: Figure, out: Path, name: str) -> list[Path]:
    """Write PNG and SVG."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    fig.savefig(paths[0], dpi=160, facecolor="white")
    fig.savefig(paths[1], facecolor="white", metadata={"Date": None})
    return paths


def density_axis(axes: Axes, densities: list[float]) -> None:
    """A logarithmic density axis with a tick at each measured density."""
    axes.set_xscale("log")
    axes.set_xticks(densities)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plot_rows.percent(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis labelled 0.1, 1, 10 instead of powers."""
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, ends: list[tuple[str, float, float, object]], fontsize: int = 8) -> None:
    """Write names at the right ends of lines: (name, x, y, colour). Crowded names are pushed apart.

    Call it when the axes have their final scale and limits.
    """
    if not ends:
        return
    to_pixels, back = axes.transData.transform, axes.transData.inverted().transform
    gap = fontsize * axes.figure.dpi / 72 * 1.15
    placed = sorted(
        ([name, *to_pixels((x, y)), color] for name, x, y, color in ends), key=lambda end: end[2]
    )
    heights = [end[2] for end in placed]
    for _ in range(50):  # neighbours that overlap each move by half the overlap
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 0:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
    for (name, x, y, color), height in zip(placed, heights, strict=True):
        at = back((x + 0.09 * axes.figure.dpi, height))
        bold = "bold" if name == OURS_NAME else "normal"
        axes.annotate(
            name,
            xy=tuple(back((x, y))),
            xytext=tuple(at),
            color=color,
            fontsize=fontsize,
            fontweight=bold,
            va="center",
            annotation_clip=False,
        )
