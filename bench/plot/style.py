"""The style of the plots: a strong colour for ours, muted colour-blind-safe ones for peers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
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
_LINE = 0.17  # inches from one line of a note to the next

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
    """An empty figure with a bold title; the lines below have the note and the machine."""
    width = max(width, 7.5)  # or the title would not fit
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    machine = f"{row['device_name']}{threads}, torch {row['torch']}, {row['utc'][:10]}"
    fig = Figure(figsize=(width, height))
    canvas = FigureCanvasAgg(fig)
    lines = _wrapped(canvas, f"{note}. {machine}.", width - 0.2)
    if len(lines) > 1:  # the machine gets lines of its own
        lines = [line for text in (note, machine) for line in _wrapped(canvas, text, width - 0.2)]
    # Lines of text at fixed heights, whatever the height of the figure. It grows with them.
    head = 0.62 + _LINE * (len(lines) - 1)
    height += head - 0.62
    fig.set_size_inches(width, height)
    fig.set_layout_engine(
        ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), w_pad=0.08, h_pad=0.08)
    )
    left = 0.1 / width
    fig.text(left, 1 - 0.1 / height, title, va="top", fontsize=13, fontweight="bold")
    for i, line in enumerate(lines):
        fig.text(left, 1 - (0.36 + _LINE * i) / height, line, va="top", color="#666666")
    return fig


def _wrapped(canvas: FigureCanvasAgg, text: str, width: float) -> list[str]:
    """The lines of a text that is at most `width` inches wide in the font of notes."""
    renderer, font = canvas.get_renderer(), FontProperties(size=_RC["font.size"])
    lines = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        pixels, _, _ = renderer.get_text_width_height_descent(line, font, ismath=False)
        if pixels > width * canvas.figure.dpi and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = line
    return lines


def legend(fig: Figure) -> None:
    """Name the labelled lines of all panels, each once, below the panels.

    Labels beside the lines would be struck through by other lines.
    """
    found: dict[str, object] = {}
    for axes in fig.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        where = {"loc": "outside lower center", "ncols": len(found)}
        fig.legend(found.values(), found, **where, frameon=False, fontsize=8)


def curve(axes: Axes, points: list[tuple[float, Row]], per_second: float, look: Any) -> None:
    """A line of medians over x, in units of which a second has `per_second`; a band p20 to p80."""
    xs = [x for x, _ in points]
    median, p20, p80 = (
        [row[column] * per_second for _, row in points] for column in ("median_s", "p20_s", "p80_s")
    )
    axes.plot(xs, median, **look)
    axes.fill_between(xs, p20, p80, color=look["color"], alpha=0.15, linewidth=0)


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
