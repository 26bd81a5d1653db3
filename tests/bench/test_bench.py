"""The benchmark suite: its rows, its checks before timing, its timing and its command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")

from bench_cases import FAST, replace_suite, right_sddmm, run_bench, small_case
from bench_rows import a_row, failed
from conftest import sweep

from bench import __main__ as cli
from bench.contenders import ours
from bench.contenders.base import Contender, Problem, Unsupported
from bench.measuring import environment, memory, results, timing
from bench.measuring.names import FROM_TOKEN_MAJOR, OP
from bench.run import check, runner
from bench.suites import cases
from rosa_kernels import registry
from rosa_kernels.testing import Case

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "sddmm": small_case("sddmm"),
    "spmm": small_case("spmm"),
    "csr_add_": small_case("csr_add_", k=1),
    "csr_gather": small_case("csr_gather", k=1),
    "csr_scatter_": small_case("csr_scatter_", k=1),
}


def contender(prepare, **options) -> Contender:
    return Contender("sddmm", options.pop("name", "candidate"), "test", prepare, **options)


# -- results --------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [a_row(), failed("unsupported", kernel="spops")]
    path = tmp_path / "deep" / "results.jsonl"
    results.append(path, rows)
    assert results.read(path) == rows


def test_appending_keeps_what_is_there(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, [a_row()])
    before = path.read_bytes()
    results.append(path, [a_row(run_id="run-2")])
    assert path.read_bytes().startswith(before)
    assert [row["run_id"] for row in results.read(path)] == ["run-1", "run-2"]
    assert [row["run_id"] for row in results.latest_run(results.read(path))] == ["run-2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown \\['surprise'\\]"),
        ({"status": "fine"}, "expected a status among ok, incorrect"),
        ({"status": "incorrect", "reason": "wrong"}, "times if and only if status is ok"),
        ({"median_s": None}, "times if and only if status is ok"),
    ],
)
def test_a_row_against_the_schema_is_not_written(tmp_path, change, message):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match=message):
        results.append(path, [a_row(), a_row() | change])
    assert not path.exists()


def test_a_status_needs_a_reason(tmp_path):
    with pytest.raises(ValueError, match="expected a reason for status 'error'"):
        results.append(tmp_path / "r.jsonl", [failed("error") | {"reason": None}])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema_version": 1, "run', r"r\.jsonl:2: Unterminated string"),
        ("[]", r"r\.jsonl:2: expected a JSON object, got list"),
        ('{"schema_version": 9}', r"r\.jsonl:2: expected schema_version 1, got 9"),
        ('{"schema_version": 1}', r"r\.jsonl:2: expected the columns of schema 1"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    results.append(path, [a_row()])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(results.ResultsError, match=message):
        results.read(path)


# -- correct before fast --------------------------------------------------------------------------


@pytest.mark.parametrize("op", SMALL)
def test_every_contender_is_ok_or_unsupported(op):
    competing = cases.contenders(SMALL[op])
    rows = runner.run_case(SMALL[op], competing, FAST)
    assert {row["kernel"] for row in rows} == {c.name for c in competing}
    for row in rows:
        assert row["status"] in ("ok", "unsupported"), (row["kernel"], row["reason"])
        assert (row["median_s"] is None) == (row["status"] != "ok")
        assert row["status"] == "ok" or row["reason"]
    by_kernel = {(row["kernel"], row["charge"]): row["status"] for row in rows}
    assert by_kernel["auto", OP] == by_kernel["reference", OP] == "ok"


def test_a_wrong_contender_is_incorrect_and_not_timed():
    def prepare(problem, charge):
        def call():
            out = right_sddmm(problem, charge)()
            out[7] += 0.01
            return out

        return call

    rows = runner.run_case(SMALL["sddmm"], [contender(prepare), contender(right_sddmm)], FAST)
    wrong, right = rows[:2], rows[2:]
    for row in wrong:
        assert row["status"] == "incorrect"
        assert "worst at (7,)" in row["reason"]
        assert row["median_s"] is None
        assert row["samples_s"] is None
    assert [row["status"] for row in right] == ["ok", "ok"]


def test_a_wrong_conversion_spoils_only_its_charge():
    def prepare(problem, charge):
        call = right_sddmm(problem, charge)
        return call if charge == OP else lambda: call() * 1.001

    rows = runner.run_case(SMALL["sddmm"], [contender(prepare)], FAST)
    assert {row["charge"]: row["status"] for row in rows} == {
        OP: "ok",
        FROM_TOKEN_MAJOR: "incorrect",
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no such instruction"), "error"),
        (MemoryError("8 GB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"),
    ],
)
def test_a_contender_that_raises_is_recorded(error, status):
    def prepare(problem, charge):
        def call():
            raise error

        return call

    (row,) = runner.run_case(
        SMALL["sddmm"], [contender(prepare, token_major=True, charges=(OP,))], FAST
    )
    assert row["status"] == status
    assert str(error) in row["reason"]


def test_a_failure_after_the_check_is_recorded():
    def prepare(problem, charge):
        call, count = right_sddmm(problem, charge), itertools.count()

        def fail_later():
            if next(count) >= 2:
                raise RuntimeError("worn out")
            return call()

        return fail_later

    rows = runner.run_case(SMALL["sddmm"], [contender(prepare, token_major=True)], FAST)
    assert {row["status"] for row in rows} == {"error"}
    assert "worn out" in rows[0]["reason"]


def test_a_rejected_case_keeps_its_reason():
    rows = runner.run_case(
        SMALL["sddmm"], [contender(right_sddmm, reject=lambda problem: "not on Sundays")], FAST
    )
    assert {(row["status"], row["reason"]) for row in rows} == {("unsupported", "not on Sundays")}


def test_a_librarys_own_refusal_is_unsupported():
    def prepare(problem, charge):
        raise Unsupported("returned 10: the operation is not supported")

    rows = runner.run_case(SMALL["sddmm"], [contender(prepare)], FAST)
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("unsupported", "returned 10: the operation is not supported")
    }


def test_an_invalid_case_gives_every_pair_an_error():
    case = dataclasses.replace(SMALL["sddmm"], mask="nonsense")
    rows = runner.run_case(case, [contender(right_sddmm)], FAST)
    assert {row["status"] for row in rows} == {"error"}
    assert "got 'nonsense'" in rows[0]["reason"]


@pytest.mark.parametrize("op", SMALL)
def test_a_sampled_check_accepts_right_and_rejects_wrong(op):
    case = dataclasses.replace(SMALL[op], m=400, n=32, density=0.05)
    problem = Problem.of(case)
    checked = check.Check(problem, terms=2000)
    assert not checked.complete
    heaviest = int(problem.pattern.row_nnz.argmax())
    assert {0, case.m - 1, heaviest} <= set(checked.rows.tolist())
    (reference,) = (c for c in cases.contenders(case) if c.name == "reference")
    got = reference.prepare(problem, OP)().clone()
    assert checked(got) < 1e-6
    entry = int(problem.pattern.crow_indices[heaviest])
    bad = got.clone()
    if op in ("sddmm", "csr_gather"):
        bad[entry] += 1
    else:
        bad[heaviest] += 1
    with pytest.raises(AssertionError, match="outside the bound"):
        checked(bad)
    unchecked = next(i for i in range(case.m) if i not in checked.rows)
    bad = got.clone()
    bad[int(problem.pattern.crow_indices[unchecked]) if bad.dim() == 1 else unchecked] = torch.nan
    with pytest.raises(AssertionError, match="expected no NaN"):
        checked(bad)
    with pytest.raises(AssertionError, match="expected shape"):
        checked(got[:-1])


def test_long_sddmm_rows_are_checked_at_their_ends():
    problem = Problem.of(Case("sddmm", 300, 500, 8, 0.9))
    checked = check.Check(problem, terms=10)
    row = checked.rows.tolist()
    assert {0, 299} <= set(row)
    assert len(checked._picked) <= len(row) * (check._ENTRIES_PER_ROW + 1)
    (auto,) = (c for c in cases.contenders(problem.case) if c.name == "auto")
    got = auto.prepare(problem, OP)()
    assert checked(got) < 1e-6
    for entry in (0, int(problem.pattern.crow_indices[1]) - 1, problem.pattern.nnz - 1):
        bad = got.clone()
        bad[entry] += 1
        with pytest.raises(AssertionError, match="outside the bound"):
            checked(bad)


def test_a_newly_registered_kernel_competes_automatically(sandbox):
    registry.register("sddmm", "brandnew", devices={"cpu"}, dtypes={torch.float32}, priority=-1)(
        lambda crow, col, a, b, out_dtype: torch.zeros(col.numel())
    )
    rows = runner.run_case(SMALL["sddmm"], cases.contenders(SMALL["sddmm"]), FAST)
    found = [row for row in rows if row["kernel"] == "brandnew"]
    assert {row["status"] for row in found} == {"incorrect"}


def test_auto_avoids_kernels_that_are_left_out(tmp_path, capsys):
    """A left-out kernel, whose results may be wrong, must not run under the name of auto."""
    case = cases.suite("first")[0]
    taken = ours.selected(Problem.of(case)).name
    options = ["--suite", "first", "--device", "cpu", "--cap", "0.01", "--time-budget", "30"]
    assert run_bench(tmp_path, *options, "--kernels", "auto", "--without", taken) == 0
    rows = results.read(tmp_path / "results.jsonl")
    served = {row["backend"] for row in rows if row["kernel"] == "auto"}
    assert served
    assert taken not in served
    assert ours.selected(Problem.of(case)).name == taken  # it may be chosen again afterwards


# -- measuring ------------------------------------------------------------------------------------


def test_quantiles_of_known_samples():
    p20, median, p80 = timing.quantiles([float(i) for i in range(11)])
    assert (p20, median, p80) == pytest.approx((2.0, 5.0, 8.0))
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)


def test_contenders_take_turns_until_steady_or_stopped():
    log: list[str] = []
    durations = {
        "steady": itertools.repeat(0.1),
        "noisy": itertools.cycle([0.1, 0.3]),
        "long": itertools.repeat(9.0),
    }

    def clock(call, count):
        name = call()
        log.append(name)
        return next(durations[name]) * count

    calls = {name: (lambda name=name: name) for name in durations}
    rule = timing.StoppingRule(cap_s=2.0, noise=0.02, min_samples=5, max_samples=60)
    got = timing.interleaved(calls, rule, clock, dict.fromkeys(calls, 0.4))
    assert len(got["steady"].seconds) == 5
    assert got["noisy"].spent >= rule.cap_s
    assert len(got["long"].seconds) == 1
    assert set(log[:3]) == set(calls)  # each has its first turn before any has its second


def test_short_calls_are_timed_in_batches():
    counts: list[int] = []

    def clock(call, count):
        counts.append(count)
        return 2e-6 * count

    got = timing.interleaved({"tiny": lambda: None}, timing.StoppingRule(), clock)["tiny"]
    assert got.calls_per_sample == 100
    assert counts[-1] == 100
    assert got.seconds == pytest.approx([2e-6] * len(got.seconds))


def test_peak_memory_sees_an_allocation():
    size = 64 * 2**20
    _, peak = memory.with_peak(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    if peak is None:
        pytest.skip("the system does not tell")
    assert size <= peak < size + 16 * 2**20


# -- command line ---------------------------------------------------------------------------------


def test_run_writes_rows_and_names_the_file(tmp_path, capsys):
    assert run_bench(tmp_path, "--suite", "overhead") == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(str(tmp_path / "results.jsonl"))
    assert "Call overhead in us" in out
    rows = results.read(tmp_path / "results.jsonl")
    assert {row["op"] for row in rows} == {"roof", "sddmm", "spmm", "csr_add_", "csr_gather"}
    assert {row["device"] for row in rows} == {"cpu"}
    assert all(row["status"] == "ok" for row in rows)
    assert run_bench(tmp_path, "--suite", "overhead") == 0
    twice = results.read(tmp_path / "results.jsonl")
    assert twice[: len(rows)] == rows
    assert len({row["run_id"] for row in twice}) == 2
    assert cli.main(["compare", *[str(tmp_path / "results.jsonl")] * 2]) == 0
    assert "same" in capsys.readouterr().out


def test_cases_beyond_the_time_budget_are_recorded(tmp_path, capsys):
    options = ("--suite", "overhead", "--ops", "sddmm", "--time-budget", "1e-9")
    assert run_bench(tmp_path, *options) == 0
    rows = [row for row in results.read(tmp_path / "results.jsonl") if row["op"] != "roof"]
    assert {row["status"] for row in rows} == {"unsupported"}
    assert "time budget of 1e-09 s was spent" in rows[0]["reason"]
    assert "Pairs without a time" in capsys.readouterr().out


def test_contenders_can_be_chosen_and_left_out(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run_bench(tmp_path, "--suite", "overhead", "--without", "auto")
    replace_suite(monkeypatch, "quick", SMALL["spmm"])
    chosen = ("--kernels", "auto", "dense", "--without", "dense")
    assert run_bench(tmp_path, "--suite", "quick", *chosen) == 0
    rows = results.read(tmp_path / "results.jsonl")
    assert {row["kernel"] for row in rows if row["op"] == "spmm"} == {"auto"}


def run_in_python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    )


def test_help_and_bad_options_need_no_torch():
    """Importing torch takes seconds."""
    done = run_in_python(
        """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None  # importing them now raises
from bench.__main__ import main
commands = ("run", "stages", "list", "plot", "report", "ratios", "calibrate", "compare", "env")
for argv, expected in (
    (["--help"], 0),
    *(([command, "--help"], 0) for command in commands),
    ([], 2),
    (["frobnicate"], 2),
    (["run", "--suite", "fast"], 2),
    (["run", "--ops", "gemm"], 2),
    (["run", "--threads", "0"], 2),
    (["run", "--timer", "warm"], 2),
    (["list", "--suite", "fast"], 2),
    (["compare", "one.jsonl"], 2),
):
    try:
        main(argv)
        raise AssertionError(argv)
    except SystemExit as end:
        assert end.code == expected, argv
""",
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_ends_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from bench.__main__ import main; sys.exit(main(['--help']))"
    # Unbuffered, argparse itself would ignore the closed pipe.
    done = run_in_python(code, stdout=write, env={**os.environ, "PYTHONUNBUFFERED": ""})
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_ctrl_c_shows_what_there_is(tmp_path, monkeypatch, capsys):
    replace_suite(monkeypatch, "quick", SMALL["spmm"], SMALL["sddmm"])
    measure, options = runner.run_case, ("--suite", "quick", "--device", "cpu")

    def interrupted(case, *arguments):
        if case.op == "sddmm":
            raise KeyboardInterrupt
        return measure(case, *arguments)

    monkeypatch.setattr(runner, "run_case", interrupted)
    assert run_bench(tmp_path, *options) == 130
    out = capsys.readouterr().out
    assert "How many times faster auto is than each peer" in out
    assert f"Wrote\n  {tmp_path / 'results.jsonl'}" in out
    assert out.endswith("1 cases have no rows yet; the same command with --resume measures them\n")
    kept = results.read(tmp_path / "results.jsonl")
    assert {row["op"] for row in kept} == {"roof", "spmm"}

    monkeypatch.setattr(runner, "run_case", measure)
    assert run_bench(tmp_path, *options, "--resume") == 0
    rows = results.read(tmp_path / "results.jsonl")
    assert rows[: len(kept)] == kept
    assert {row["op"] for row in rows[len(kept) :]} == {"sddmm"}
    assert len({row["run_id"] for row in rows}) == 1


@sweep(column=["git_sha", "threads", "torch"])
def test_a_run_is_resumed_only_on_its_machine(tmp_path_factory, monkeypatch, capsys, column):
    out = tmp_path_factory.mktemp("out")
    replace_suite(monkeypatch, "quick", SMALL["spmm"])
    options = ("--suite", "quick", "--device", "cpu")
    with pytest.raises(SystemExit):
        run_bench(out, *options, "--resume")
    assert "results.jsonl: expected a results file" in capsys.readouterr().err
    row = environment.run_record([]) | environment.device_record("cpu")
    results.append(out / "results.jsonl", [a_row(case="another case", **(row | {column: "old"}))])
    with pytest.raises(SystemExit):
        run_bench(out, *options, "--resume")
    assert f"--resume: expected {column} old as in run {row['run_id']}" in capsys.readouterr().err


def test_unusable_paths_are_bad_input(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    results.append(file, [a_row(), a_row(kernel="spops")])
    overhead = ("--suite", "overhead", "--device", "cpu")
    for argv in (
        ["run", *overhead, "--no-plots", "--out", file],
        ["run", *overhead, "--no-plots", "--out", file / "deeper"],
        ["stages", "--suite", "second", "--device", "cpu", "--out", file / "stages.jsonl"],
        ["plot", file, "--out", file],
        ["report", tmp_path],
        ["compare", file, tmp_path],
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*map(str, argv)])
        assert exit_info.value.code == 2
        assert str(tmp_path) in capsys.readouterr().err.splitlines()[-1]
    assert len(results.read(file)) == 2


def test_list_and_env(capsys):
    assert cli.main(["list"]) == 0
    assert cli.main(["list", "--suite", "overhead"]) == 0
    assert cli.main(["list", "--suite", "tokens", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cases.SUITES)
    assert "csr_gather/uniform/32x32" in out
    assert "cusparse-alg2" in out
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "Contenders of spmm" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--suite", "fast"], "invalid choice: 'fast' (choose from"),
        (["run", "--ops", "gemm"], "invalid choice: 'gemm' (choose from"),
        (["run", "--kernels", "cublas"], "--kernels: expected some of auto, "),
        (["run", "--threads", "0"], "expected a positive int, got 0"),
        (["run", "--suite", "overhead", "--kernels", "dense"], "--kernels: expected some of auto"),
        (["run", "--suite", "overhead", "--without", "cublas"], "--without: expected some of auto"),
        (["report", "missing.jsonl"], "missing.jsonl: expected a results file"),
        (["ratios", "missing.jsonl"], "missing.jsonl: expected a results file"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_bad_arguments_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_run_is_explained(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results.append(path, [a_row()])
    with pytest.raises(SystemExit):
        cli.main(["report", str(path), "--run-id", "run-9"])
    assert "--run-id: expected one of run-1, got run-9" in capsys.readouterr().err


def test_compare_can_fail_a_build(tmp_path, capsys):
    for name, ms in (("base", 1.0), ("new", 2.0)):
        results.append(tmp_path / name, [json.loads(json.dumps(a_row(ms=ms)))])
    argv = ["compare", str(tmp_path / "base"), str(tmp_path / "new")]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--fail-on-slower"]) == 1
    assert "slower" in capsys.readouterr().out
