"""A run that is killed or interrupted, and resumed, ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rosa_train.run import metrics
from rosa_train.run.checkpoint import checkpoints, read_state
from rosa_train.run.train import train

from .train_runs import Runs, arguments, sizes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LONG = {"max_steps": 30, "schedule": "wl8", "save_steps": 5, "mask_steps": 2, "dropout": 0.1}
# Fields of times and memory, which differ from run to run.
TIMED = {"seconds", "tokens_per_s", "peak_bytes"}


@pytest.fixture(scope="module")
def whole(runs: Runs, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of an uninterrupted run, and the run's duration in seconds."""
    folder = tmp_path_factory.mktemp("whole")
    runs(folder / "log", source, folder / "warm", **LONG)  # not timed: the first run loads pages
    began = time.perf_counter()
    assert runs(folder / "log", source, folder / "out", **LONG) == 0, (folder / "log").read_text()
    return folder / "out", time.perf_counter() - began


def untimed(out: Path) -> list[dict[str, Any]]:
    rows = metrics.read(out / "metrics.jsonl")
    return [{name: row[name] for name in row.keys() - TIMED} for row in rows]


def assert_same_run(out: Path, whole: Path, what: str) -> None:
    steps = [row["step"] for row in untimed(out) if row["phase"] in ("warmup", "train")]
    assert steps == list(range(1, len(steps) + 1)), what
    assert untimed(out) == untimed(whole), what
    for path in sorted((whole).rglob("*.safetensors")):
        name = path.relative_to(whole)
        if not name.parts[0].startswith("checkpoint-"):
            got, expected = load_file(out / name), load_file(path)
            assert got.keys() == expected.keys(), f"{what}: {name}"
            for key, tensor in expected.items():
                assert got[key].numpy().tobytes() == tensor.numpy().tobytes(), f"{what}: {key}"
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert not hidden, what


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_resume_after_kills_at_random_times(
    kills: int, seed: int, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Runs are killed at random times and resumed until they end, `kills` times in all."""
    expected, seconds = whole
    rng, log = random.Random(seed), tmp_path / "log"
    moments: list[float] = []
    chains = 0
    while len(moments) < kills:
        chains += 1
        out = tmp_path / f"out{chains}"
        while True:
            after = rng.uniform(0, seconds)
            saved = out.exists() and checkpoints(out)
            how = {"resume_from_checkpoint": "last"} if saved else {"overwrite_output_dir": True}
            pid = runs.start(log, source, out, **how, **LONG)
            if len(moments) < kills:
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)  # not counted if the run has ended
            status = runs.wait(pid)
            if status == 0:
                break
            assert status == -signal.SIGKILL, log.read_text()
            moments.append(round(after, 3))
            for folder in checkpoints(out) if out.exists() else []:
                read_state(folder)  # every checkpoint folder is complete
        assert_same_run(out, expected, f"seed {seed}, killed after {moments} s")
    assert len(moments) == kills


def test_resume_after_a_kill_in_the_mask_phase(
    runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    # Batches 1 to 16 are eight steps of two batches. Batch 18 is the second of the mask phase.
    killed = runs(log, source, out, _signal=(18, signal.SIGKILL), **LONG)
    assert killed == -signal.SIGKILL, log.read_text()
    assert (out / "checkpoint-8").exists()
    assert not (out / "checkpoint-8-masked").exists()
    assert all(row["phase"] == "warmup" for row in untimed(out))
    assert runs(log, source, out, resume_from_checkpoint="last", **LONG) == 0, log.read_text()
    assert_same_run(out, whole[0], "killed in the mask phase")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signal_saves_and_prints_how_to_resume(
    number: signal.Signals, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    settings = LONG | {"save_steps": None}
    status = runs(log, source, out, _signal=(9, number), **settings)
    assert status == 128 + number, log.read_text()
    (saved,) = checkpoints(out)
    step = read_state(saved).step
    assert step == 5  # batch 9 is the first of step 5
    assert f"{number.name} after step {step}: saved {saved}" in log.read_text()
    assert "--resume_from_checkpoint last" in log.read_text()
    assert not (out / "result.json").exists()
    again = settings | {"resume_from_checkpoint": "last"}
    assert runs(log, source, out, **again) == 0, log.read_text()
    assert_same_run(out, whole[0], number.name)


@pytest.mark.parametrize("method", ["rosa", "lora+", "spa", "full"])
def test_resuming_any_checkpoint_gives_the_same_bits(
    method: str, source: Path, tmp_path: Path
) -> None:
    settings = sizes(method) | {"max_steps": 6, "save_steps": 1, "save_total_limit": None}
    expected = tmp_path / "whole"
    result = train(*arguments(source, expected, **settings))
    saved = checkpoints(expected)
    masked = {"rosa": ["checkpoint-3-masked"], "spa": ["checkpoint-0-masked"]}.get(method, [])
    names = [f"checkpoint-{step}" for step in range(1, 7)]
    assert sorted(path.name for path in saved) == sorted(names + masked)
    for path in saved:
        out = tmp_path / path.name
        again = train(*arguments(source, out, **settings | {"resume_from_checkpoint": str(path)}))
        assert again.losses == result.losses
        assert_same_run(out, expected, path.name)


def test_resuming_an_earlier_checkpoint_deletes_later_ones(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"save_steps": 2, "save_total_limit": None}
    train(*arguments(source, out, **settings))
    before = untimed(out)
    (out / "checkpoint-6" / "of-the-first-run").touch()
    shutil.rmtree(out / "checkpoint-10")
    back = {"resume_from_checkpoint": str(out / "checkpoint-4"), "max_steps": 10}
    train(*arguments(source, out, **settings | back))
    assert untimed(out) == before
    assert not (out / "checkpoint-6" / "of-the-first-run").exists()
    assert [path.name for path in checkpoints(out)] == [
        "checkpoint-2", "checkpoint-3", "checkpoint-3-masked", "checkpoint-4", "checkpoint-6",
        "checkpoint-8", "checkpoint-10",
    ]  # fmt: skip


def test_resuming_with_other_arguments_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(*arguments(source, out, max_steps=4, save_steps=4))
    other = {"max_steps": 4, "learning_rate": 1e-3, "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 there, 0\.001 here"):
        train(*arguments(source, out, **other))
    # Arguments that do not change the weights may differ.
    same = {"max_steps": 4, "logging_steps": 3, "resume_from_checkpoint": "last"}
    train(*arguments(source, out, **same))


def test_resuming_with_other_data_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 4}
    train(*arguments(source, out, **settings))
    lines = (source / "train.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    lines[0] = json.dumps(record | {"completion": record["completion"] + "a"})
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    settings |= {"train_file": str(tmp_path / "other.jsonl"), "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match=r"data: '[0-9a-f]+' there"):
        train(*arguments(source, out, **settings))


# -- what else may be in the folder


def files_of(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_complete_run_is_not_trained_again(
    save_steps: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": save_steps}
    settings |= {"eval_file": str(source / "eval.jsonl")}
    first = train(*arguments(source, out, **settings))
    assert bool(checkpoints(out)) == bool(save_steps)
    before, last = files_of(out), settings | {"resume_from_checkpoint": "last"}
    capsys.readouterr()
    assert train(*arguments(source, out, **last)) == first
    assert f"{out}: the run is complete already" in capsys.readouterr().err
    other_data = tmp_path / "other.jsonl"
    other_data.write_text((source / "train.jsonl").read_text().replace("a", "b"))
    for changes, words in (
        ({"learning_rate": 1e-3}, r"learning_rate: 0\.01 there, 0\.001 here"),
        ({"max_steps": 6}, "steps: 4 there, 6 here"),
        ({"train_file": str(other_data)}, "data: '[0-9a-f]+' there"),
    ):
        with pytest.raises(ValueError, match=words):
            train(*arguments(source, out, **last | changes))
    assert files_of(out) == before


def test_a_run_without_checkpoint_is_not_resumed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 0}
    train(*arguments(source, out, **settings))
    (out / "result.json").unlink()
    before = files_of(out)
    last = settings | {"resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match=r"--overwrite_output_dir starts again.*without"):
        train(*arguments(source, out, **last))
    assert files_of(out) == before
    # A run that was killed before its first step has left nothing to lose.
    shutil.rmtree(out / "adapter")
    (out / "metrics.jsonl").write_text("")
    train(*arguments(source, out, **last))
    assert (out / "result.json").exists()


def test_only_a_run_can_be_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.py").write_text("1")
    settings: dict[str, Any] = {"max_steps": 1, "schedule": "lora_only", "density": None}
    again = settings | {"overwrite_output_dir": True}
    with pytest.raises(ValueError, match=r"expected a folder with a run .*, got .*model"):
        train(*arguments(source, tmp_path, **again))
    assert (tmp_path / "model" / "mine.py").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="--output_dir: expected a folder, got the file"):
        train(*arguments(source, tmp_path / "file", **again))


def test_two_runs_cannot_share_a_folder(runs: Runs, source: Path, tmp_path: Path) -> None:
    """The first run is stopped in step 5, so that it has the folder when the second starts."""
    out, log = tmp_path / "out", tmp_path / "log"
    first = runs.start(log, source, out, _signal=(9, signal.SIGSTOP), **LONG)
    deadline = time.monotonic() + 60
    while "stopped" not in (state := _state(first)):  # Linux
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    try:
        for how in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "last"}):
            before = files_of(out)
            assert runs(log, source, out, **how, **LONG) == 1
            assert "--output_dir: expected a folder without a run in progress" in log.read_text()
            assert files_of(out) == before
    finally:
        os.kill(first, signal.SIGKILL)
    assert runs.wait(first) == -signal.SIGKILL
    # A killed run leaves no lock.
    assert runs(log, source, out, overwrite_output_dir=True, **LONG) == 0, log.read_text()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0]


def test_runs_that_start_together_do_not_mix(runs: Runs, source: Path, tmp_path: Path) -> None:
    """Neither finds the folder when it starts, so each takes the lock only before it writes."""
    out = tmp_path / "out"
    both = [runs.start(tmp_path / f"log{i}", source, out, seed=i, **LONG) for i in range(2)]
    status = [runs.wait(pid) for pid in both]
    assert sorted(status) == [0, 1]
    assert json.loads((out / "args.json").read_text())["seed"] == status.index(0)
    assert len(json.loads((out / "result.json").read_text())["losses"]) == LONG["max_steps"]


def test_checkpoints_are_due_by_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rosa_train.run import trainer

    settings: dict[str, Any] = {"max_steps": 5, "save_total_limit": None}
    names = {}
    for seconds in (600.0, 0.0):
        monkeypatch.setattr(trainer, "SAVE_SECONDS", seconds)
        train(*arguments(source, tmp_path / str(seconds), **settings))
        names[seconds] = [path.name for path in checkpoints(tmp_path / str(seconds))]
    masked = ["checkpoint-3", "checkpoint-3-masked"]
    assert names[600.0] == masked
    assert names[0.0] == ["checkpoint-1", "checkpoint-2", *masked, "checkpoint-4", "checkpoint-5"]
