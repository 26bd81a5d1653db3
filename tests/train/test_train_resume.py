"""Runs that are killed, interrupted or resumed end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import Runs, arguments, sizes, write_all

from rosa_train.run import metrics
from rosa_train.run.checkpoint import checkpoints, read_state
from rosa_train.run.train import train

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LONG = {"max_steps": 30, "schedule": "wl8", "save_steps": 5, "mask_steps": 2, "dropout": 0.1}
# What is timed differs from run to run, of the process's memory or of the clock.
TIMED = {"seconds", "tokens_per_s", "peak_bytes"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    runs(folder / "log", source, folder / "warm", **LONG)  # the first one pages everything in
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


def kill_and_resume(
    kills: int, seed: int, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """Chains of runs, each killed at a moment drawn over its whole length, until done."""
    expected, seconds = whole
    rng, log = random.Random(seed), tmp_path / "log"
    moments: list[float] = []
    chains = 0
    while len(moments) < kills:
        chains += 1
        out = tmp_path / f"out{chains}"
        while True:
            after = rng.uniform(0, seconds)
            pid = runs.start(log, source, out, resume_from_checkpoint="last", **LONG)
            if len(moments) < kills:
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)  # no effect if it has ended, which counts for none
            status = runs.wait(pid)
            if status == 0:
                break
            assert status == -signal.SIGKILL, log.read_text()
            moments.append(round(after, 3))
            for folder in checkpoints(out) if out.exists() else []:
                read_state(folder)  # whatever bears a checkpoint's name is one
        assert_same_run(out, expected, f"seed {seed}, killed after {moments} s")
    assert len(moments) == kills


@pytest.mark.parametrize("seed", [1])
def test_three_kills(
    seed: int, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    kill_and_resume(3, seed, runs, source, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_twenty_kills(
    seed: int, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    kill_and_resume(20, seed, runs, source, whole, tmp_path)


def test_a_kill_in_the_mask_phase(
    runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    # Eight steps of two batches, then the second of the batches that gradients are taken of.
    killed = runs(log, source, out, _signal=(18, signal.SIGKILL), **LONG)
    assert killed == -signal.SIGKILL, log.read_text()
    assert (out / "checkpoint-8").exists()
    assert not (out / "checkpoint-8-masked").exists()
    assert all(row["phase"] == "warmup" for row in untimed(out))
    assert runs(log, source, out, resume_from_checkpoint="last", **LONG) == 0, log.read_text()
    assert_same_run(out, whole[0], "killed in the mask phase")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, runs: Runs, source: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    settings = LONG | {"save_steps": None}
    status = runs(log, source, out, _signal=(9, number), **settings)
    assert status == 128 + number, log.read_text()
    (saved,) = checkpoints(out)
    step = read_state(saved).step
    assert step == 5  # whose first batch it was
    assert f"{number.name} after step {step}: saved {saved}" in log.read_text()
    assert "--resume_from_checkpoint last" in log.read_text()
    assert not (out / "result.json").exists()
    again = settings | {"resume_from_checkpoint": "last"}
    assert runs(log, source, out, **again) == 0, log.read_text()
    assert_same_run(out, whole[0], number.name)


@pytest.mark.parametrize("method", ["rosa", "lora+", "spa", "full"])
def test_any_checkpoint_leads_to_the_same_bits(method: str, source: Path, tmp_path: Path) -> None:
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


def test_going_back_deletes_what_came_later(source: Path, tmp_path: Path) -> None:
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


def test_another_run_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(*arguments(source, out, max_steps=4, save_steps=4))
    other = {"max_steps": 4, "learning_rate": 1e-3, "resume_from_checkpoint": "last"}
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 there, 0\.001 here"):
        train(*arguments(source, out, **other))
    # What is measured or where, is free to change.
    same = {"max_steps": 4, "logging_steps": 3, "resume_from_checkpoint": "last"}
    train(*arguments(source, out, **same))


def test_other_data_are_refused(source: Path, tmp_path: Path) -> None:
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
