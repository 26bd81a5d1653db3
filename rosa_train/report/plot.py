"""Draws figures of runs from metrics.jsonl. matplotlib is imported only to draw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, cycle
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
_PHASES = ("warmup", "mask", "train", "eval", "generate")
# The height of a line of text and the width of a letter, as shares of an axis of 4.4 by 2.9 inches.
_LINE_HEIGHT = 0.065
_LETTER_WIDTH = 0.019
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
        steps, losses, tokens_per_s: the number of each optimizer step, its loss and its speed.
        seconds: the time in warm-up, masks and training up to the end of each step. Evaluation is
            not counted, because runs that are evaluated more often would look slower.
        rates: by name, the steps and learning rates.
        eval_steps, eval_seconds, eval_losses: step, `seconds` and loss of each evaluation.
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


def looks(labels: Sequence[str]) -> list[dict[str, Any]]:
    """A colour and a marker for each label, a method or "method (folder)".

    The first label of a method has the method's own look. No two of the first nine are alike.
    """
    taken: set[str] = set()
    others = cycle(_OTHERS)
    found = []
    for label in labels:
        method = label.partition(" (")[0]
        own = method in _LOOKS and method not in taken
        color, marker = _LOOKS[method] if own else next(others)
        taken.add(method)
        found.append({"color": color, "marker": marker})
    return found


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
    places = [Path(folder) for folder in folders]
    runs = {label: read_run(place) for label, place in zip(labels(places), places, strict=True)}
    target = Path(out) if out is not None else places[0] / "curves.png"
    with style():
        return save(run_figure(runs, caption(places)), target)


def labels(folders: Sequence[Path]) -> list[str]:
    """A label for each run: its method, with its folder if the method has several runs."""
    methods = [str(_arguments(folder).get("method") or folder.name) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    short = [f"{method} ({name})" for method, name in zip(methods, names, strict=True)]
    return [
        method
        if methods.count(method) == 1
        else label
        if short.count(label) == 1
        else f"{method} ({folder})"
        for method, label, folder in zip(methods, short, folders, strict=True)
    ]


def caption(folders: Sequence[Path]) -> str:
    """Model, data and day of some runs. What differs between them is listed."""
    facts: list[dict[str, None]] = [{}, {}, {}]
    for folder in folders:
        args = _arguments(folder)
        model = Path(str(args.get("model_name_or_path") or "")).name
        data = Path(str(args.get("train_file") or ""))
        changed = datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime)
        day = f"{changed.day} {changed:%B %Y}"
        data_name = args.get("dataset_name") or "/".join(data.parts[-2:])
        for fact, value in zip(facts, (model, str(data_name), day), strict=True):
            if value:
                fact[value] = None
    return ", ".join(" and ".join(fact) for fact in facts if fact)


def run_figure(runs: Mapping[str, Sequence[Row]], title: str = "") -> Figure:
    """Loss, learning rates and tokens/s over steps, and the peak memory of each phase."""
    fig = figure(10, 7)
    axes = fig.subplots(2, 2)
    loss, rate, speed, memory = axes.flat
    drawn = {name: curves(rows) for name, rows in runs.items()}
    kinds = dict(zip(drawn, looks(list(drawn)), strict=True))
    present = {phase for run in drawn.values() for phase in run.peaks}
    phases = [phase for phase in _PHASES if phase in present]
    for index, (name, run) in enumerate(drawn.items()):
        kind = kinds[name]
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
    sparse = any("sparse_learning_rate" in run.rates for run in drawn.values())
    loss.set_title(_loss_title("Loss", drawn))
    rate.set_title("Learning rate (dashed: sparse branch)" if sparse else "Learning rate")
    speed.set_title("Tokens per second")
    for axis in (loss, rate, speed):
        _count_steps(axis)
    speed.set_ylim(bottom=0)
    memory.set_title("Peak memory by phase, MB")
    memory.set_xticks(range(len(phases)), phases)
    times = [
        (f"{name}: masks, {after - before:.1f} s", kinds[name]["color"])
        for name, run in drawn.items()
        for _, before, after in run.masks
    ]
    for row, (text, color) in enumerate(times):  # one below the other, so that none is hidden
        place = (0.98, 0.97 - 0.06 * row)
        loss.annotate(text, place, xycoords="axes fraction", ha="right", va="top", color=color)
    _name_runs(fig, kinds, title)
    return fig


def loss_figure(runs: Mapping[str, Sequence[Row]], title: str = "") -> Figure:
    """Training and evaluation loss of several runs, over steps and over seconds."""
    fig = figure(10, 4.4)
    by_step, by_second = fig.subplots(1, 2, sharey=True)
    kinds = dict(zip(runs, looks(list(runs)), strict=True))
    drawn = {name: curves(rows) for name, rows in runs.items()}
    for name, run in drawn.items():
        kind = kinds[name]
        _draw_losses(by_step, name, run, run.steps, run.eval_steps, kind)
        _draw_losses(by_second, name, run, run.seconds, run.eval_seconds, kind)
        for step, before, after in run.masks:
            by_step.axvline(step + 0.5, color=kind["color"], linestyle=":", linewidth=1)
            by_second.axvspan(before, after, color=kind["color"], alpha=0.15, linewidth=0)
    by_step.set_title(_loss_title("Loss over steps", drawn))
    _count_steps(by_step)
    by_second.set_title("Loss over seconds of training")
    by_second.set_xlabel("seconds (masks included, evaluation not)")
    _name_runs(fig, kinds, title)
    return fig


def tradeoff_figure(results: Sequence[Row], title: str = "") -> Figure:
    """Evaluation loss and exact match over peak memory and training time, a point per method."""
    heights = {"eval_loss": "evaluation loss", "exact_match": "exact match"}
    heights = {k: v for k, v in heights.items() if any(row.get(k) is not None for row in results)}
    fig = figure(10, max(3.6 * len(heights), 3.6))
    fig.suptitle(title, fontsize=9)
    grid = fig.subplots(max(len(heights), 1), 2, squeeze=False)
    across = (("peak_bytes", "peak memory, MB", 1e6), ("train_seconds", "seconds of training", 1.0))
    kinds = looks([row["method"] for row in results])
    for axes, (height, label) in zip(grid, heights.items(), strict=False):
        for axis, (key, below, unit) in zip(axes, across, strict=True):
            axis.set_title(f"{label[0].upper()}{label[1:]} over {below.split(',')[0]}")
            axis.set_xlabel(below)
            axis.margins(y=0.15)
            if height == "exact_match":
                axis.set_ylim(-0.05, 1.05)
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            points: list[tuple[float, float, str, str]] = []
            for row, kind in zip(results, kinds, strict=True):
                if row.get(height) is None or row.get(key) is None:
                    continue
                x, y = row[key] / unit, row[height]
                axis.plot([x], [y], linestyle="none", markersize=8, **kind)
                points.append((x, y, row["method"], kind["color"]))
            # The axis starts at 0, so that a difference of 1 % does not look like a multiple.
            axis.set_xlim(0, axis.dataLim.x1 * 1.15 if axis.has_data() else 1)
            _label_points(axis, points)
    return fig


def _label_points(axis: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes a label beside each point. Labels that would collide are moved down or up."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    placed: list[tuple[float, float, float]] = []  # left and right end, height, as axes fractions
    for x, y, text, color in sorted(points, key=lambda point: (-point[1], point[0])):
        start, wanted = (x - left) / (right - left) + 0.03, (y - low) / (high - low)
        end = start + _LETTER_WIDTH * len(text)
        beside = [at for a, b, at in placed if a < end and start < b]
        at = wanted
        while beside and min(abs(at - other) for other in beside) < _LINE_HEIGHT:
            at -= _LINE_HEIGHT / 4
        if at < _LINE_HEIGHT / 2 and beside:
            at = max(beside) + _LINE_HEIGHT
        placed.append((start, end, at))
        moved = abs(at - wanted) > _LINE_HEIGHT / 2
        axis.annotate(
            text,
            (x, y),
            (start, at),
            textcoords="axes fraction",
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if moved else None,
        )


def _count_steps(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(
        MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )


def _loss_title(title: str, drawn: Mapping[str, Curves]) -> str:
    evaluated = any(run.eval_losses for run in drawn.values())
    return f"{title} (dashed: evaluation)" if evaluated else title


def _name_runs(fig: Figure, kinds: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Writes the title above the axes, and below them the look of each run."""
    from matplotlib.lines import Line2D

    fig.suptitle(title, fontsize=9)
    handles = [Line2D([], [], label=name, markersize=5, **kind) for name, kind in kinds.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


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


def _arguments(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
