"""Kernels under experimental settings: when these are set, and which tables have the rows."""

from __future__ import annotations

import os

import pytest
import torch

from bench.report.rows import ratios_to_peers

pytest.importorskip("numpy")

from bench_cases import FAST, run_bench, small_case
from bench_rows import a_row

from bench.contenders import experiments
from bench.contenders.base import Contender, Problem
from bench.contenders.overhead import overhead_cases
from bench.layer.case import layer_case
from bench.measuring import results
from bench.measuring.names import FROM_TOKEN_MAJOR
from bench.report import case_results
from bench.report import experiments as experiment_tables
from bench.run import runner

CASE = small_case("sddmm", dtype=torch.bfloat16)


def test_every_tile_kernel_is_tried_under_every_setting():
    names = [contender.name for contender in experiments.contenders(CASE, "cuda")]
    assert len(names) == len(set(names)) == 6
    assert {"cuda/tile panels=32", "cuda/wgmma early", "cuda/tile panels=32 early"} <= set(names)
    assert not experiments.contenders(CASE, "cpu")
    assert not experiments.contenders(small_case("spmm"), "cuda")
    (overhead,) = (case for case in overhead_cases() if case.op == "sddmm")
    assert not experiments.contenders(overhead, "cuda")
    assert not experiments.contenders(layer_case(64, 64, 32), "cuda")


def test_settings_are_set_only_during_the_call(monkeypatch):
    seen = []
    monkeypatch.setenv("ROSA_PANEL_MIB", "64")
    monkeypatch.delenv("ROSA_EARLY_LAUNCH", raising=False)

    def look() -> tuple[str | None, str | None]:
        return os.environ.get("ROSA_PANEL_MIB"), os.environ.get("ROSA_EARLY_LAUNCH")

    def prepare(problem: Problem, charge: str):
        seen.append(("prepare", *look()))

        def call():
            seen.append(("call", *look()))
            if len(seen) > 2:
                raise RuntimeError("worn out")

        return call

    base = Contender("sddmm", "cuda/tile", "cuda", prepare, workspace=lambda problem: look())
    settings = experiments.SETTINGS["panels=32 early"]
    tried = experiments.with_settings(base, "panels=32 early", settings)
    assert (tried.name, tried.mode) == ("cuda/tile panels=32 early", "experiment")
    call = tried.prepare(None, "op")
    call()
    assert look() == ("64", None)
    with pytest.raises(RuntimeError, match="worn out"):
        call()
    assert look() == ("64", None)
    assert seen == [("prepare", "64", None), ("call", "32", "1"), ("call", "32", "1")]
    assert tried.workspace(None) == ("32", "1")


def test_a_wrong_experiment_is_not_timed():
    def wrong(problem: Problem, charge: str):
        return lambda: torch.ones(problem.pattern.nnz, dtype=torch.bfloat16)

    base = Contender("sddmm", "cuda/tile", "cuda", wrong, token_major=True)
    rows = runner.run_case(CASE, [experiments.with_settings(base, "early", {})], FAST)
    assert {(row["kernel"], row["status"]) for row in rows} == {("cuda/tile early", "incorrect")}


def test_experiments_have_a_table_of_their_own():
    common = {"op": "sddmm", "charge": FROM_TOKEN_MAJOR, "device": "cuda"}
    rows = [
        a_row(**common, kernel="auto", backend="cuda/tile", ms=1.0),
        a_row(**common, kernel="cuda/tile", backend="cuda/tile", ms=1.0),
        a_row(**common, kernel="cuda/tile early", backend="cuda/tile", mode="experiment", ms=0.5),
        a_row(**common, kernel="dense", ms=3.0),
    ]
    (result,) = case_results.case_results(rows)
    assert result.best_own()["median_s"] == 1e-3
    assert set(result.peers) == {"dense"}
    assert [ratio.peer["kernel"] for ratio in ratios_to_peers(rows, FROM_TOKEN_MAJOR)] == ["dense"]
    (table,) = experiment_tables.tables(rows)
    assert table.columns[3:] == ["panels=32", "early", "panels=32 early"]
    assert table.rows[0][1:] == ["cuda/tile", "1.000", "-", "0.500", "-"]
    assert table.rows[1] == ["geometric mean", "cuda/tile", "", "-", "0.500", "-"]
    assert not experiment_tables.tables(rows[:2])


def test_cuda_options_are_ignored_on_a_cpu(tmp_path, capsys):
    options = ("--suite", "first", "--device", "cpu", "--time-budget", "1e-9")
    cuda = ("--experiments", "--timer", "graph", "--calibrate", str(tmp_path / "machine.json"))
    assert run_bench(tmp_path, *options, *cuda) == 0
    said = capsys.readouterr().out
    for option in ("--experiments", "--timer", "--calibrate"):
        assert f"{option} applies to CUDA only and is ignored on a CPU" in said
    assert not (tmp_path / "machine.json").exists()
    rows = [row for row in results.read(tmp_path / "results.jsonl") if row["op"] != "roof"]
    assert {row["status"] for row in rows} == {"unsupported"}
    assert all(row["reason"].startswith("not run: ") for row in rows)
    assert "auto was not timed, 8 x: unsupported, not run: the time budget" in said
