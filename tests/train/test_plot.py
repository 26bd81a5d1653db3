"""Figures of runs: the plotted numbers, and the picture files."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path

import pytest

from rosa_train.report import plot

pytest.importorskip("matplotlib")


def lines(steps: int = 6, mask_after: int | None = 2, rate: float = 1.0) -> list[dict]:
    """Metrics of a run with losses of 1/step.

    A step takes 1 s, the masks take 5 s, and an evaluation takes 10 s.
    """
    rows: list[dict] = []
    for step in range(1, steps + 1):
        if mask_after is not None and step == mask_after + 1:
            rows.append({"step": mask_after, "phase": "mask", "seconds": 5.0, "peak_bytes": 3e6})
        masked = mask_after is None or step > mask_after
        row = {
            "step": step,
            "phase": "train" if masked else "warmup",
            "loss": 1 / step,
            "learning_rate": rate * step,
            "tokens": 100 * step,
            "tokens_per_s": 100.0 + step,
            "seconds": 1.0,
            "peak_bytes": (1e6 if masked else 2e6) + step,
        }
        if masked and mask_after is not None:
            row["sparse_learning_rate"] = rate * step / 10
        rows.append(row)
        if step % 3 == 0:
            rows.append(
                {"step": step, "phase": "eval", "loss": 2 / step, "seconds": 10.0, "peak_bytes": 1}
            )
    return rows


def series(axis, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return [*map(float, line.get_xdata())], [*map(float, line.get_ydata())]


def test_curve_seconds_include_masks_but_not_evaluation() -> None:
    run = plot.curves(lines())
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.seconds == [1, 2, 8, 9, 10, 11]
    assert run.losses == [1 / step for step in run.steps]
    assert run.masks == [(2, 2.0, 7.0)]
    assert (run.eval_steps, run.eval_seconds, run.eval_losses) == ([3, 6], [8, 11], [2 / 3, 2 / 6])
    assert run.rates["learning_rate"] == (run.steps, [1, 2, 3, 4, 5, 6])
    assert run.rates["sparse_learning_rate"] == ([3, 4, 5, 6], [0.3, 0.4, 0.5, 0.6])
    assert run.peaks == {"warmup": 2e6 + 2, "mask": 3e6, "train": 1e6 + 6, "eval": 1}


@pytest.mark.parametrize("count", [0, 1, 19, 20, 45])
def test_smooth_averages_a_twentieth_of_the_steps(count: int) -> None:
    values = [float((7 * i) % 5) for i in range(count)]
    window = max(count // 20, 1)
    expected = [
        sum(values[max(i - window + 1, 0) : i + 1]) / min(window, i + 1) for i in range(count)
    ]
    assert plot.smooth(values) == pytest.approx(expected)


def test_run_figure_draws_each_series() -> None:
    with plot.style():
        fig = plot.run_figure({"rosa": lines(), "lora": lines(mask_after=None)})
    loss, rate, speed, memory = fig.axes
    steps, losses = series(loss, "rosa")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx([1 / step for step in steps])
    assert series(loss, "rosa, evaluation") == ([3, 6], [2 / 3, 2 / 6])
    assert series(rate, "rosa sparse")[0] == [3, 4, 5, 6]
    assert series(speed, "lora")[1] == pytest.approx([101, 102, 103, 104, 105, 106])
    dotted = [line for line in loss.lines if line.get_linestyle() == ":"]
    assert [float(line.get_xdata()[0]) for line in dotted] == [2.5]
    heights = [[bar.get_height() for bar in bars] for bars in memory.containers]
    assert heights == [
        pytest.approx([2.000002, 3.0, 1.000006, 1e-6]),
        pytest.approx([1.000006, 1e-6]),
    ]
    assert [text.get_text() for text in memory.get_xticklabels()] == [
        "warmup", "mask", "train", "eval",
    ]  # fmt: skip
    # LoRA has no warm-up and no masks. It has bars for training and evaluation only.
    middles = [bar.get_x() + bar.get_width() / 2 for bar in memory.containers[1]]
    assert middles == pytest.approx([2.2, 3.2])


def test_loss_figure_shows_steps_and_seconds() -> None:
    with plot.style():
        fig = plot.loss_figure({"rosa": lines(), "spa": lines(mask_after=0)})
    by_step, by_second = fig.axes
    assert series(by_step, "rosa")[0] == [1, 2, 3, 4, 5, 6]
    assert series(by_second, "rosa")[0] == [1, 2, 8, 9, 10, 11]
    assert series(by_second, "rosa, evaluation") == ([8, 11], [2 / 3, 2 / 6])
    assert series(by_second, "spa")[0] == [6, 7, 8, 9, 10, 11]


def test_tradeoff_figure_has_a_point_per_method() -> None:
    rows = [
        {"method": "lora", "eval_loss": 2.0, "exact_match": 0.5, "peak_bytes": 4e6},
        {"method": "rosa", "eval_loss": 3.0, "exact_match": 0.25, "peak_bytes": 5e6},
        {"method": "spa", "eval_loss": None, "exact_match": None, "peak_bytes": 6e6},
    ]
    for seconds, row in enumerate(rows, start=7):
        row["train_seconds"] = float(seconds)
    with plot.style():
        fig = plot.tradeoff_figure(rows)
    points = [[(float(*p.get_xdata()), float(*p.get_ydata())) for p in a.lines] for a in fig.axes]
    assert points == [
        [(4.0, 2.0), (5.0, 3.0)],
        [(7.0, 2.0), (8.0, 3.0)],
        [(4.0, 0.5), (5.0, 0.25)],
        [(7.0, 0.5), (8.0, 0.25)],
    ]
    shown = [sorted(text.get_text() for text in axis.texts) for axis in fig.axes]
    assert shown == [["lora", "rosa"]] * 4
    assert all(axis.get_xlim()[0] == 0 for axis in fig.axes)
    colors = [point.get_color() for point in fig.axes[0].lines]
    assert colors == [look["color"] for look in plot.looks(["lora", "rosa"])]


def test_tradeoff_figure_without_exact_match_or_rows() -> None:
    row = {"method": "lora", "eval_loss": 2.0, "peak_bytes": 4e6, "train_seconds": 1.0}
    with plot.style():
        assert len(plot.tradeoff_figure([row]).axes) == 2
        assert not any(axis.lines for axis in plot.tradeoff_figure([]).axes)


def test_draw_runs_writes_a_picture(tmp_path) -> None:
    for name, method in (("a", "rosa"), ("b", "rosa")):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in lines())
        (tmp_path / name / "metrics.jsonl").write_text(text)
        (tmp_path / name / "args.json").write_text(json.dumps({"method": method}))
    path = plot.draw_runs([tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "a" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(path.read_bytes()) > 10_000
    other = plot.draw_runs([tmp_path / "b"], tmp_path / "new" / "one.png")
    assert other.read_bytes().startswith(b"\x89PNG")


def test_drawing_keeps_the_matplotlib_settings() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with plot.style():
        plot.loss_figure({"rosa": lines()})
    assert dict(mpl.rcParams) == before


def test_read_run_refuses_folders_without_steps(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plot: expected the folder of a run"):
        plot.read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phase": "mask"}\n')
    with pytest.raises(ValueError, match=r"plot: expected steps to draw, got none"):
        plot.read_run(tmp_path)


def test_runs_get_distinct_looks() -> None:
    names = ["rosa (a)", "rosa (b)", "rosa (c)", *list(plot._LOOKS)[1:], "x", "y"]
    found = plot.looks(names)
    assert len({str(one) for one in found}) == len(names)
    assert found[0] == plot.looks(["rosa"])[0]


def write_run(folder: Path, method: str, **args: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines()))
    (folder / "args.json").write_text(json.dumps({"method": method, **args}))
    return folder


def test_labels_and_caption_tell_runs_apart(tmp_path: Path) -> None:
    args = {"model_name_or_path": "/models/tiny", "train_file": "/data/viggo/train.jsonl"}
    folders = [
        write_run(tmp_path / "a" / "run", "rosa", **args),
        write_run(tmp_path / "b" / "run", "rosa", **args),
        write_run(tmp_path / "c", "rosa", **args),
        write_run(tmp_path / "d", "lora", **args | {"model_name_or_path": "hub/small"}),
    ]
    assert plot.labels(folders) == [
        f"rosa ({folders[0]})", f"rosa ({folders[1]})", "rosa (c)", "lora",
    ]  # fmt: skip
    for folder in folders:
        os.utime(folder / "metrics.jsonl", (1764331200, 1764331200))
    assert plot.caption(folders) == "tiny and small, viggo/train.jsonl, 28 November 2025"
    assert plot.caption(folders[:1]) == "tiny, viggo/train.jsonl, 28 November 2025"


def texts_that_overlap(fig) -> list[tuple[str, str]]:
    from matplotlib.text import Text

    fig.canvas.draw()
    boxes = [
        (text.get_text(), Text.get_window_extent(text))  # an annotation's own has its line, too
        for axis in fig.axes
        for text in axis.texts
    ]
    return [
        (one, other)
        for (one, box), (other, second) in combinations(boxes, 2)
        if box.overlaps(second)
    ]


def test_labels_of_equal_points_do_not_overlap() -> None:
    """All methods have the same exact match, and nearly the same memory and time."""
    for match in (0.0, 0.5, 1.0):
        rows = [
            {
                "method": method,
                "eval_loss": 0.2 + i / 1e4,
                "exact_match": match,
                "peak_bytes": 2e9 + i,
                "train_seconds": 70.0 + i / 10,
            }
            for i, method in enumerate(plot._LOOKS)
        ]
        with plot.style():
            assert texts_that_overlap(plot.tradeoff_figure(rows, "a title")) == []


def test_masks_of_several_runs_are_named_apart() -> None:
    with plot.style():
        fig = plot.run_figure({f"rosa ({name})": lines() for name in "abcd"}, "a title")
        assert texts_that_overlap(fig) == []
    said = [text.get_text() for text in fig.axes[0].texts]
    assert said == [f"rosa ({name}): masks, 5.0 s" for name in "abcd"]


def test_steps_are_whole_numbers() -> None:
    for count in (1, 2, 4, 35, 1000):
        with plot.style():
            fig = plot.run_figure({"lora": lines(count, mask_after=None)})
            fig.canvas.draw()
        assert all(float(tick).is_integer() for tick in fig.axes[0].get_xticks()), count
