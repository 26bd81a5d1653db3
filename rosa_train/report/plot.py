"""Draws figures of runs from metrics.jsonl. matplotlib is imported only to draw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa_train.run import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# RoSA has a strong colour, and the other methods have muted colours of Paul Tol's colour-blind-safe
# palettes. The markers differ too, for print in grey.
_LOOKS = {
    "rosa": ("#D55E00", "o"),
    "lora": ("#6699CC", "^"),
    "lora+": ("#332288", "v"),
    "spa": ("#882255", "P"),
    "full": ("#555555", "s"),
}
_OTHERS = (("#44AA99", "D"), ("#CCBB44", "X"), ("#997700", "<"), ("#999999", ">"))
_INK = "#333333"
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": _INK,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True)
class Curves:
    """The numbers of a metrics.jsonl as lists to draw.

    Attributes:
        steps, losses, tokens_per_s: the optimizer steps, and their numbers.
        seconds: the time in warm-up, masks and training up to the end of each step. Evaluation is
            not counted, because runs that are evaluated more often would look slower.
        rates: by name, the steps and learning rates.
        eval_steps, eval_seconds, eval_losses: the same for evaluations.
        masks: (step, seconds before, seconds after) of each mask phase.
        peaks: the peak memory in bytes, by phase.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    rates: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    eval_steps: list[int] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    masks: list[tuple[int, float, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)


def curves(rows: Sequence[Row]) -> Curves:
    """The curves of a run's lines."""
    found, clock = Curves(), 0.0
    for row in rows:
        phase, step = row["phase"], row["step"]
        before = clock
        if phase in ("warmup", "mask", "train"):
            clock += row.get("seconds", 0.0)
        if phase in ("warmup", "train"):
            found.steps.append(step)
            found.seconds.append(clock)
            found.losses.append(row["loss"])
            found.tokens_per_s.append(row["tokens_per_s"])
            for name in ("learning_rate", "sparse_learning_rate"):
                if name in row:
                    steps, rates = found.rates.setdefault(name, ([], []))
                    steps.append(step)
                    rates.append(row[name])
        elif phase == "mask":
            found.masks.append((step, before, clock))
        elif phase == "eval":
            found.eval_steps.append(step)
            found.eval_seconds.append(clock)
            found.eval_losses.append(row["loss"])
        if "peak_bytes" in row:
            found.peaks[phase] = max(found.peaks.get(phase, 0), row["peak_bytes"])
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean over each value and those before it. The window is 5 % of all values."""
    window = max(len(values) // 20, 1)
    sums = [0.0, *accumulate(values)]
    starts = [max(i - window, 0) for i in range(1, len(values) + 1)]
    return [
        (sums[end] - sums[start]) / (end - start)
        for start, end in zip(starts, range(1, len(values) + 1), strict=True)
    ]


def look(name: str, index: int = 0) -> dict[str, Any]:
    """The colour and marker of a method. Other names take theirs by `index`."""
    color, marker = _LOOKS.get(name) or _OTHERS[index % len(_OTHERS)]
    return {"color": color, "marker": marker}


def read_run(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: the folder has no run.
        ValueError: the run has no step.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"plot: expected the folder of a run, got no {path}")
    rows = metrics.read(path)
    if not any(row["phase"] in ("warmup", "train") for row in rows):
        raise ValueError(f"plot: expected steps to draw, got none in {path}")
    return rows


def draw_runs(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draws runs into one figure. Returns the PNG, by default curves.png in the first folder."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for folder in map(Path, folders):
        name = _method(folder)
        runs[name if name not in runs else str(folder)] = read_run(folder)
    target = Path(out) if out is not None else Path(folders[0]) / "curves.png"
    with style():
        return save(run_figure(runs), target)


def run_figure(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Loss, learning rates and tokens/s over steps, and the peak memory of each phase."""
    fig = figure(10, 6.4)
    axes = fig.subplots(2, 2)
    loss, rate, speed, memory = axes.flat
    drawn = {name: curves(rows) for name, rows in runs.items()}
    phases = list(dict.fromkeys(phase for run in drawn.values() for phase in run.peaks))
    for index, (name, run) in enumerate(drawn.items()):
        kind = look(name, index)
        _draw_losses(loss, name, run, run.steps, run.eval_steps, kind)
        for which, (steps, rates) in run.rates.items():
            branch = " sparse" if which.startswith("sparse") else ""
            dashes = "--" if branch else "-"
            rate.plot(steps, rates, dashes, color=kind["color"], label=name + branch)
        speed.plot(run.steps, run.tokens_per_s, color=kind["color"], alpha=0.25, linewidth=0.8)
        speed.plot(run.steps, smooth(run.tokens_per_s), color=kind["color"], label=name)
        width = 0.8 / len(drawn)
        memory.bar(
            [phases.index(phase) - 0.4 + (index + 0.5) * width for phase in run.peaks],
            [peak / 1e6 for peak in run.peaks.values()],
            width,
            color=kind["color"],
            label=name,
        )
        for axis in (loss, rate, speed):
            for step, _, _ in run.masks:
                axis.axvline(step + 0.5, color=kind["color"], linestyle=":", linewidth=1)
    for axis, title in ((loss, "Loss"), (rate, "Learning rate"), (speed, "Tokens per second")):
        axis.set_title(title)
        axis.set_xlabel("step")
    speed.set_ylim(bottom=0)
    memory.set_title("Peak memory by phase, MB")
    memory.set_xticks(range(len(phases)), phases)
    for run in drawn.values():
        for step, before, after in run.masks[:1]:
            text = f" masks, {after - before:.1f} s"
            loss.annotate(text, (step + 0.5, 1), xycoords=("data", "axes fraction"), va="top")
    loss.legend()
    rate.legend()
    return fig


def loss_figure(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Training and evaluation loss of several runs, over steps and over seconds."""
    fig = figure(10, 4)
    by_step, by_second = fig.subplots(1, 2, sharey=True)
    for index, (name, rows) in enumerate(runs.items()):
        run, kind = curves(rows), look(name, index)
        _draw_losses(by_step, name, run, run.steps, run.eval_steps, kind)
        _draw_losses(by_second, name, run, run.seconds, run.eval_seconds, kind)
        for step, before, after in run.masks:
            by_step.axvline(step + 0.5, color=kind["color"], linestyle=":", linewidth=1)
            by_second.axvspan(before, after, color=kind["color"], alpha=0.15, linewidth=0)
    by_step.set_title("Loss over steps")
    by_step.set_xlabel("step")
    by_second.set_title("Loss over seconds of training")
    by_second.set_xlabel("seconds (masks included, evaluation not)")
    by_step.legend()
    return fig


def tradeoff_figure(results: Sequence[Row]) -> Figure:
    """Evaluation loss and exact match over peak memory and training time, a point per method."""
    heights = {"eval_loss": "evaluation loss", "exact_match": "exact match"}
    heights = {k: v for k, v in heights.items() if any(row.get(k) is not None for row in results)}
    fig = figure(10, max(3.6 * len(heights), 3.6))
    grid = fig.subplots(max(len(heights), 1), 2, squeeze=False)
    across = (("peak_bytes", "peak memory, MB", 1e6), ("train_seconds", "seconds of training", 1.0))
    for axes, (height, label) in zip(grid, heights.items(), strict=False):
        for axis, (key, title, unit) in zip(axes, across, strict=True):
            axis.set_title(f"{label[0].upper()}{label[1:]} over {title.split(',')[0]}")
            axis.set_xlabel(title)
            axis.margins(y=0.15)
            if height == "exact_match":
                axis.set_ylim(-0.05, 1.05)
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            for index, row in enumerate(results):
                if row.get(height) is None or row.get(key) is None:
                    continue
                x, y = row[key] / unit, row[height]
                axis.plot([x], [y], linestyle="none", markersize=8, **look(row["method"], index))
                offset = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
                axis.annotate(row["method"], (x, y), **offset)
            # The axis starts at 0, so that a difference of 1 % does not look like a multiple.
            axis.set_xlim(0, axis.dataLim.x1 * 1.15 if axis.has_data() else 1)
    return fig


def figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


@contextmanager
def style() -> Iterator[None]:
    """A context with this module's settings of matplotlib. They are restored afterwards.

    Figures must be both made and saved inside it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "plot: expected the package matplotlib, got none: pip install 'rosa-kernels[train]'"
        ) from error
    with mpl.rc_context({**mpl.rcParamsDefault, **_RC}):
        yield


def save(fig: Figure, path: Path) -> Path:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=160, facecolor="white")
    return path


def _draw_losses(
    axis: Axes,
    name: str,
    run: Curves,
    where: Sequence[float],
    eval_where: Sequence[float],
    kind: Mapping[str, Any],
) -> None:
    color = kind["color"]
    axis.plot(where, run.losses, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(where, smooth(run.losses), color=color, linewidth=1.6, label=name)
    if run.eval_losses:
        dashes: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "markersize": 5}
        axis.plot(eval_where, run.eval_losses, label=f"{name}, evaluation", **dashes, **kind)


def _method(folder: Path) -> str:
    try:
        return str(json.loads((folder / "args.json").read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name
