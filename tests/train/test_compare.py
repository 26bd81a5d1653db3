"""`rosa_train compare`: methods at equal budgets, one row per method, and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rosa_train.cli.parse import parse_run
from rosa_train.report import compare as comparing
from rosa_train.report.compare import compare, matched_budget
from rosa_train.report.comparison import table
from rosa_train.run.signals import Interrupted

from .train_runs import ROOT, command_line

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

# Parameters that one rank adds to the two layers of the tiny model: m + n of each target.
PER_RANK = 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32))
ALL = 18_208  # parameters of the tiny model


@pytest.fixture(autouse=True)
def one_thread_in_subprocesses(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def options(source: Path, out: Path, **changes: object) -> list[str]:
    """The command line of a short comparison."""
    values = {
        "model_name_or_path": source,
        "train_file": source / "train.jsonl",
        "eval_file": source / "eval.jsonl",
        "output_dir": out,
        "max_length": 24,
        "rank": 2,
        "schedule": "wl2",
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "generate_examples": 2,
        "max_new_tokens": 3,
        "use_cpu": True,
    } | changes
    return command_line(values)


def parsed(source: Path, out: Path, **changes: object):
    return parse_run("compare", "", options(source, out, **changes))[0]


@pytest.fixture
def quick(monkeypatch) -> list[str]:
    """Replaces training by a stub that writes a run's files; lists the methods in their order.

    Some learning rates make the stub fail: 666 by an error, 9 by SIGKILL, and 2 interrupts spa.
    """
    trained: list[str] = []

    def train(values: dict, folder: Path, *, fresh: bool) -> int:
        name, out = values["method"], Path(values["output_dir"])
        trained.append(name)
        assert values["resume_from_checkpoint"] == "last"
        out.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name}.log"
        log.write_text("warnings\n")
        if values["learning_rate"] == 666:
            log.write_text("step 1\nrosa_train train: error: train: got a loss of nan\nmore\n")
            return 1
        if values["learning_rate"] == 9:
            return -signal.SIGKILL
        if values["learning_rate"] == 2 and name == "spa":
            raise Interrupted("SIGINT in the run of spa", 130)
        line = {"step": 1, "phase": "train", "loss": 1.0, "tokens_per_s": 10.0, "seconds": 2.0}
        (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (out / "args.json").write_text(json.dumps(values))
        factor = {"lora": 1, "spa": 2}.get(name, 4)
        result = {
            "trainable": ALL if name == "full" else int(values["budget"]),
            "steps": 1,
            "losses": [1.0],
            "eval_losses": {"1": 2.0, "10": 3.0},
            "exact_match": 0.5,
            "tokens": 7,
            "tokens_per_s": 10.0 / factor,
            "seconds": {"load": 9.0, "train": 2.0 * factor, "mask": 1.0 * factor, "eval": 5.0},
            "peak_bytes": {"mask": 3 * factor, "train": 5 * factor, "eval": 100},
        }
        (out / "result.json").write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(comparing, "_train", train)
    return trained


def test_methods_train_with_equal_parameter_counts(source, tmp_path) -> None:
    """End to end."""
    out = tmp_path / "out"
    rows = compare(["lora", "rosa", "spa"], parsed(source, out))
    assert [row["method"] for row in rows] == ["lora", "rosa", "spa"]
    lora, _, spa = rows
    for row in rows:
        assert row["status"] == "ok"
        assert row["trainable"] == row["budget"] == 2 * PER_RANK
        assert row["steps"] == 5
        assert 0 < row["eval_loss"] < 10
        assert row["exact_match"] in (0, 0.5, 1)
        assert row["tokens_per_s"] > 0
        assert row["peak_bytes"] > 100e6
    assert lora["peak_bytes_ratio"] == lora["tokens_per_s_ratio"] == 1
    assert spa["peak_bytes_ratio"] == spa["peak_bytes"] / lora["peak_bytes"]
    assert spa["tokens"] == lora["tokens"]  # the same examples in the same order
    folder = out / "compare"
    written = (folder / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == rows
    for name in ("loss.png", "tradeoff.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name})" in (folder / "results.md").read_text()


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        # The layers have 15,360 elements, and a rank adds 928 parameters.
        ({"rank": None, "budget": "10%"}, 2),
        ({"rank": None, "budget": "9%"}, 1),
        ({"rank": None, "budget": "2.5K"}, 3),
        ({"rank": 3}, 3),
        ({"rank": None}, 16),
    ],
)
def test_budget_is_rounded_to_a_lora_rank(source, tmp_path, given, rank) -> None:
    arguments = parsed(source, tmp_path, **given)
    assert matched_budget(arguments[0], arguments[2]) == rank * PER_RANK


def test_each_method_gets_its_arguments(source, tmp_path) -> None:
    arguments = parsed(source, tmp_path, schedule="wl2")
    kinds = comparing._checked(["lora", "lora+", "spa", "rosa", "full"], arguments[2])
    runs = [comparing._run_arguments(kind, 100, arguments) for kind in kinds]
    assert [run["schedule"] for run in runs] == [None, None, None, "wl2", None]
    assert [run["budget"] for run in runs] == ["100"] * 4 + [None]
    assert [run["output_dir"] for run in runs] == [str(tmp_path / kind.name) for kind in kinds]
    same = {"method", "schedule", "budget", "output_dir"}
    shared = [{k: v for k, v in run.items() if k not in same} for run in runs]
    assert shared[1:] == shared[:-1]


def test_rows_have_ratios_to_lora(source, tmp_path, quick) -> None:
    rows = compare(["spa", "lora", "full"], parsed(source, tmp_path))
    spa, lora, full = rows
    assert (lora["train_seconds"], lora["peak_bytes"], lora["eval_loss"]) == (3.0, 5, 3.0)
    assert (spa["train_seconds_ratio"], spa["peak_bytes_ratio"]) == (2, 2)
    assert (full["tokens_per_s_ratio"], full["trainable"]) == (0.25, ALL)
    shown = table(rows)
    assert shown.rows[0][:5] == ["spa", "ok", f"{2 * PER_RANK:,}", "3.0000", "50.0%"]
    assert shown.rows[2][6] == "0.25"
    assert all(len(row) == len(shown.columns) for row in shown.rows)


def test_without_lora_there_are_no_ratios(source, tmp_path, quick) -> None:
    (row,) = compare(["spa"], parsed(source, tmp_path))
    assert not [name for name in row if name.endswith("_ratio")]
    assert table([row]).rows[0][6] == "-"


def test_second_call_reuses_finished_runs(source, tmp_path, quick) -> None:
    first = compare(["lora", "spa"], parsed(source, tmp_path))
    assert compare(["lora", "spa"], parsed(source, tmp_path)) == first
    assert quick == ["lora", "spa"]
    compare(["lora", "spa", "full"], parsed(source, tmp_path))
    assert quick == ["lora", "spa", "full"]
    compare(["lora"], [*parsed(source, tmp_path, overwrite_output_dir=True)])
    assert quick == ["lora", "spa", "full", "lora"]


def test_an_interrupted_comparison_resumes(source, tmp_path, quick) -> None:
    with pytest.raises(Interrupted, match="SIGINT in the run of spa"):
        compare(["lora", "spa"], parsed(source, tmp_path, learning_rate=2))
    written = (tmp_path / "compare" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in written] == ["lora"]
    with pytest.raises(Interrupted):  # the stub interrupts spa each time
        compare(["lora", "spa"], parsed(source, tmp_path, learning_rate=2))
    assert quick == ["lora", "spa", "spa"]


def test_finished_runs_of_other_arguments_are_refused(source, tmp_path, quick) -> None:
    compare(["lora"], parsed(source, tmp_path))
    with pytest.raises(
        ValueError,
        match=r"expected --seed 42 as in the run in .*, got 1; choose another --output_dir",
    ):
        compare(["lora"], parsed(source, tmp_path, seed=1))
    assert quick == ["lora"]


@pytest.mark.parametrize(
    ("rate", "reason"),
    [(666, "train: got a loss of nan (exit status 1)"), (9, "ended by SIGKILL; see ")],
)
def test_failed_runs_have_a_row_with_reason(source, tmp_path, quick, rate, reason) -> None:
    rows = compare(["lora", "full"], parsed(source, tmp_path, learning_rate=rate))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["reason"].startswith(reason)
    assert quick == ["lora", "full"]
    assert table(rows).rows[0][:3] == ["lora", "failed", "-"]
    text = (tmp_path / "compare" / "results.md").read_text()
    assert "- **full** failed" in text
    assert ".png" not in text


def test_command_prints_a_table_and_reports_failed_methods(source, tmp_path, quick, capsys) -> None:
    argv = ["--methods", "lora, spa", *options(source, tmp_path)]
    assert comparing.main(argv) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["method", "lora", "spa"]
    assert out.endswith(f"Wrote {tmp_path / 'compare'}\n")
    argv = ["--methods", "lora", *options(source, tmp_path / "b", learning_rate=666)]
    assert comparing.main(argv) == 1
    assert "lora failed: train: got a loss of nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("methods", "changes", "expected"),
    [
        (["lora", "rosa2"], {}, "rosa2"),
        (["lora", "lora"], {}, "--methods: expected different names, got lora,lora"),
        ([], {}, "--methods: expected different names, got none"),
        (["lora"], {"density": 0.1}, "--density: expected --budget or --rank"),
        (["lora"], {"rank_pattern": '{"q_proj": 3}'}, "--rank_pattern: expected --budget"),
        (["lora"], {"rank": None, "budget": "200%"}, "budget: expected at most"),
        (["lora"], {"target_modules": "none"}, "candidates"),
        (["rosa"], {"schedule": "wl5"}, "N below the 5 steps"),
        # The smallest RoSA adapter has rank 1 and one nonzero.
        (
            ["lora", "rosa"],
            {"rank": None, "budget": str(PER_RANK)},
            f"at least {PER_RANK + 1:,} .* leave rosa out of --methods",
        ),
        # The data has 41 examples, which are 11 batches of 4.
        (["lora", "rosa"], {"max_steps": None, "schedule": None}, "N below the 11 steps"),
        (["lora"], {"max_length": 4096}, "--max_length: expected at most the 64 positions"),
        (["lora"], {"eval_file": "no.jsonl"}, "no.jsonl"),
    ],
)
def test_bad_input_is_refused_before_training(
    source, tmp_path, quick, methods, changes, expected
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=expected.replace("(", r"\(")):
        compare(methods, parsed(source, tmp_path / "out", **changes))
    assert quick == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_same_command_resumes_after_ctrl_c(source, tmp_path) -> None:
    """Sends SIGINT to the real command in the middle of a run, and runs the command again."""
    argv = [sys.executable, "-m", "rosa_train", "compare", "--methods", "lora"]
    argv += options(source, tmp_path / "out", max_steps=400)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    lines = tmp_path / "out" / "lora" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "SIGINT in the run of lora. To go on, give the same command again" in said
    (checkpoint,) = (tmp_path / "out" / "lora").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 400
    again = subprocess.run(argv, cwd=ROOT, env=environment, timeout=300, check=False)
    assert again.returncode == 0
    log = (tmp_path / "out" / "compare" / "lora.log").read_text()
    result = json.loads((tmp_path / "out" / "lora" / "result.json").read_text())
    assert len(result["losses"]) == 400, log
