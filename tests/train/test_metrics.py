"""The lines of metrics.jsonl, their summary, peak memory and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rosa_train.files import write_file
from rosa_train.run import metrics
from rosa_train.run.metrics import Metrics, PeakMemory, cut, read, summary


def test_lines_are_written_once_and_read_back(tmp_path: Path) -> None:
    log = Metrics(tmp_path, main=True, start=0, total=2)
    log.write(1, "train", loss=2.5, tokens_per_s=1.0, grad_norm=None)
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "phase": "train", "loss": 2.5, "tokens_per_s": 1.0}
    ]
    log.close()
    again = Metrics(tmp_path, main=True, start=1, total=2)
    again.write(2, "train", loss=2.0, tokens_per_s=1.0)
    again.close()
    assert again.lines == 2
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_progress_is_said_now_and_then(tmp_path: Path, capsys, monkeypatch) -> None:
    """A step takes 20 s here, and a line is due each minute."""
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    log = Metrics(tmp_path, main=True, start=2, total=1000)
    for step in range(3, 12):
        clock[0] += 20
        log.write(step, "train", loss=2.5, tokens_per_s=1234.0)
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {n} of 1,000" for n in (3, 6, 9)]
    assert lines[0] == "step 3 of 1,000: loss 2.5000, 1,234 tokens/s, 5 h 32 min left"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = Metrics(tmp_path, main=False, start=0, total=2, report_to="tensorboard")
    log.write(1, "train", loss=2.5)
    log.say("hello")
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read(path)] == [1, 2]
    cut(path, 2, path)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut(path, 1, path)
    assert path.read_text() == '{"step": 1}\n'


def test_invalid_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected JSON"):
        read(path)


def test_cutting_a_missing_file_makes_an_empty_one(tmp_path: Path) -> None:
    cut(tmp_path / "none.jsonl", 0, tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_file(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


def test_summary_adds_up_the_metric_lines() -> None:
    rows = [
        {"step": 1, "phase": "warmup", "loss": 3.0, "tokens": 10, "seconds": 1.0, "peak_bytes": 5},
        {"step": 1, "phase": "mask", "seconds": 4.0, "peak_bytes": 9},
        {"step": 2, "phase": "train", "loss": 2.0, "tokens": 30, "seconds": 2.0, "peak_bytes": 7},
        {"step": 2, "phase": "eval", "loss": 2.5, "seconds": 0.5, "peak_bytes": 6},
        {"step": 3, "phase": "train", "loss": 1.0, "tokens": 60, "seconds": 1.0, "peak_bytes": 8},
        {"step": 3, "phase": "eval", "loss": 1.5, "seconds": 0.5, "peak_bytes": 6},
        {"step": 3, "phase": "generate", "exact_match": 0.25, "seconds": 1.0, "peak_bytes": 6},
    ]
    assert summary(rows) == {
        "losses": [3.0, 2.0, 1.0],
        "eval_losses": {2: 2.5, 3: 1.5},
        "exact_match": 0.25,
        "tokens": 60,
        "tokens_per_s": 15.0,
        "seconds": {"warmup": 1.0, "mask": 4.0, "train": 3.0, "eval": 1.0, "generate": 1.0},
        "peak_bytes": {"warmup": 5, "mask": 9, "train": 8, "eval": 6, "generate": 6},
    }


def test_summary_of_no_lines() -> None:
    assert summary([])["tokens_per_s"] == 0.0


def test_peak_memory_counts_freed_memory_until_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    start = memory.bytes()
    size = 64 * 2**20
    torch.ones(size // 4)
    assert memory.bytes() >= start + size * 0.9
    memory.reset()
    if memory.bytes() > start + size * 0.9:
        pytest.skip("/proc/self/clear_refs is refused here")
    assert memory.bytes() < start + size // 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 4), (2, 6)):  # killed after step 4, resumed from step 2
        log = Metrics(tmp_path, main=True, start=start, total=6, report_to="tensorboard")
        for step in range(start + 1, stop + 1):
            log.write(step, "train", loss=float(start), tokens_per_s=1.0)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert values == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_each_line_is_a_json_object(tmp_path: Path) -> None:
    log = Metrics(tmp_path, main=True, start=0, total=1)
    log.write(1, "generate", exact_match=1.0)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["exact_match"] == 1.0
