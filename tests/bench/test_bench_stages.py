"""Stage times: from profiled GPU kernels to a table. The events are made up."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

pytest.importorskip("numpy")

from bench_cases import right_sddmm, run_bench, small_case

from bench import __main__ as cli
from bench.contenders.base import Contender, Problem
from bench.measuring import kernel_times
from bench.report import stages as stage_tables
from bench.run import stages
from rosa_kernels.choice import Candidate
from rosa_kernels.kernel import Estimate

TILE = (
    "void rosa::cuda::sddmm_tile_kernel<rosa::cuda::Bf16, rosa::cuda::TileShape<128, 256, 3> >"
    "(rosa::cuda::TileArgs)"
)
PACK = "void rosa::cuda::pack_kernel<unsigned short>(rosa::cuda::PackSide, rosa::cuda::PackSide)"
FINALIZE = "void rosa::cuda::sddmm_finalize_kernel<rosa::cuda::Bf16>(rosa::cuda::Slices, int*)"
FLUSH = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(float)"
MEMSET = "Memset (Device)"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (TILE, "tiles"),
        (PACK, "pack"),
        (FINALIZE, "finalize"),
        ("void rosa::cuda::sddmm_wgmma_kernel<__nv_bfloat16>(rosa::cuda::TileArgs)", "tiles"),
        ("void rosa::cuda::sddmm_gather_kernel<float>(rosa::cuda::GatherArgs)", "gather"),
        ("void rosa::cuda::spmm_gather_kernel<float, float>(GatherRowsArgs)", "gather"),
        ("void rosa::cuda::spmm_staged_kernel<Bf16, Bf16, 8>(StagedArgs)", "stage+gather"),
        ("void rosa::cuda::spmm_tile_kernel<Bf16>(SpmmTileArgs)", "tiles+gather"),
        ("void rosa::cuda::spmm_unpermute_kernel<unsigned short>(UnpermuteArgs)", "unpermute"),
        ("_ZN4rosa4cuda11pack_kernelItEEvNS0_8PackSideES2_ll", "pack"),
        (FLUSH, "at::native::reduce_kernel"),
        (
            "void at::(anonymous namespace)::copy_kernel<int>(int)",
            "at::copy_kernel",
        ),
        ("void other::pack_kernel<int>(int)", "other::pack_kernel"),
        ("void rosa::cuda::repack_kernel<int>(int)", "rosa::cuda::repack_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("rosa_new_kernel", "rosa_new_kernel"),
    ],
)
def test_kernel_names_map_to_the_cost_models_stages(name, stage):
    assert kernel_times.stage_of(name) == stage


def test_every_product_kernel_has_a_stage():
    folder = kernel_times.__file__.rsplit("/bench/", 1)[0]
    source = "".join(
        path.read_text() for path in sorted(stages.Path(folder).glob("cpp/src/cuda/s*mm*.cuh"))
    )
    for name in kernel_times._STAGES:
        assert f"{name}(" in source or name == "pack_kernel"
    assert source.count("__global__") == len(kernel_times._STAGES) - 1


def events(*calls):
    """The events of `calls`: before each call a memset and a flush, then the call's kernels."""
    at = itertools.count()
    return [
        (name, float(next(at)), duration)
        for call in calls
        for name, duration in [(MEMSET, 1.0), (FLUSH, 60.0), *call]
    ]


def test_times_sum_per_call_with_median_over_calls():
    chunked = [(PACK, 10.0), (TILE, 20.0), (PACK, 12.0), (TILE, 30.0), ("new", 1.0)]
    slow = [(PACK, 90.0), (TILE, 90.0)]
    found = events(chunked, chunked, slow)
    got = kernel_times.per_call(reversed(found), {FLUSH, MEMSET})
    assert got == {PACK: 22.0, TILE: 50.0, "new": 1.0}
    assert kernel_times.by_stage(got) == {"pack": 22.0, "tiles": 50.0, "new": 1.0}
    assert kernel_times.per_call([], {FLUSH}) == {}
    assert kernel_times.per_call(events([], []), {FLUSH, MEMSET}) == {}


class Profiled(kernel_times.Profiler):
    """A profiler whose library returns the events `found`, or raises them."""

    def __init__(self, monkeypatch, found) -> None:
        def recorded(run):
            run()
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(kernel_times, "recorded", recorded)
        monkeypatch.setattr(kernel_times, "Flush", lambda device: lambda: None)
        super().__init__("cuda")


def test_an_empty_profile_gives_a_reason(monkeypatch):
    assert "recorded no GPU kernel" in Profiled(monkeypatch, []).missing
    error = RuntimeError("CUPTI_ERROR_NOT_INITIALIZED\nmore")
    profiler = Profiled(monkeypatch, error)
    assert profiler.missing == "torch.profiler failed: RuntimeError: CUPTI_ERROR_NOT_INITIALIZED"
    assert profiler.times(lambda: None) == {}
    assert kernel_times.Profiler("cpu").times(lambda: None) == {}


def test_flushes_separate_the_calls(monkeypatch):
    profiler = Profiled(monkeypatch, [(FLUSH, 0.0, 60.0), (MEMSET, 1.0, 1.0)])
    call = [(PACK, 10.0), (TILE, 20.0)]
    monkeypatch.setattr(kernel_times, "recorded", lambda run: (run(), events(call, call))[1])
    made = []
    assert profiler.times(lambda: made.append(1)) == {PACK: 10.0, TILE: 20.0}
    assert len(made) == kernel_times.CALLS + kernel_times._WARM_UP


# -- rows and tables ------------------------------------------------------------------------------

CASE = small_case("sddmm")


def native(name: str, prepare=right_sddmm, **options) -> Contender:
    return Contender("sddmm", name, "cpu", prepare, **options)


def test_every_kernel_gets_a_row_and_a_reason(tmp_path, capsys):
    def fails(problem, charge):
        raise RuntimeError("no such launch")

    def wrong(problem, charge):
        return lambda: torch.zeros(problem.pattern.nnz)

    competing = [
        native("cpu/avx2"),
        native("cpu/avx512", fails),
        native("cpu/portable", wrong),
        native("cpu/avx2 panels=32", reject=lambda problem: "not on Sundays"),
        native("cpu/avx2 panels=32 early"),
        Contender("sddmm", "dense", "torch", right_sddmm),
    ]
    out = tmp_path / "stages.jsonl"
    rows = list(stages.measure("cpu", [(CASE, competing)], {"run_id": "r"}, out, float("inf")))
    by_kernel = {row["kernel"]: row for row in rows}
    assert [row["status"] for row in rows] == ["ok", "error", "incorrect", "unsupported"]
    assert by_kernel["cpu/avx2"]["call_us"] > 0
    assert by_kernel["cpu/avx2"]["timer"] == "host"
    assert "no such launch" in by_kernel["cpu/avx512"]["reason"]
    assert by_kernel["cpu/avx2 panels=32"]["reason"] == "not on Sundays"
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert "Stages on cpu have no times: a CPU has no GPU kernels" in capsys.readouterr().out
    assert not list(stages.measure("cpu", [(CASE, competing)], {}, out, 0.0))
    assert "Stages of 1 of 1 cases: not run" in capsys.readouterr().out


def a_stage_row(kernel="cuda/tile", **columns):
    row = {"op": "sddmm", "mask": "real:14.q_proj", "k": 8192, "kernel": kernel, "status": "ok"}
    return row | columns


def test_the_table_compares_measured_and_predicted_times():
    predicted = {"pack": 80.0, "tiles": 50.0, "gather": 10.0, "finalize": 1.0, "launch": 10.0}
    rows = [
        a_stage_row(
            stages_us={"tiles": 100.0, "pack": 88.0, "Memcpy DtoD": 2.0, "finalize": 1.0},
            predicted_us=predicted,
            call_us=200.0,
        ),
        a_stage_row("cuda/x", stages_us={}, predicted_us=predicted, call_us=200.0),
        a_stage_row("cpu/x", stages_us={}, predicted_us=None, call_us=7.0),
        a_stage_row(status="error"),
    ]
    (table,) = stage_tables.tables(rows)
    assert table.columns[2:] == [
        *("pack", "tiles", "gather", "finalize", "Memcpy DtoD", "sum", "launch", "call")
    ]
    assert table.rows[0][2:] == [
        *("88.0/80.0 1.10", "100/50.0 2.00", "-/10.0", "1.0/1.0 1.00", "2.0"),
        *("191/141 1.35", "9.0/10.0 0.90", "200/151 1.32"),
    ]
    assert table.rows[1][2:4] == ["-/80.0", "-/50.0"]
    assert table.rows[2][2:] == ["", "", "", "", "", "", "", "7.0"]
    assert table.rows[3][:4] == ["geometric mean", "cuda/tile", "1.10", "2.00"]
    (table,) = stage_tables.tables(rows, limit=1)
    assert [line[0] for line in table.rows] == ["real:14.q_proj k8192", *["geometric mean"] * 2]
    assert "the first 1 of 3" in table.title
    both = [*rows, rows[0] | {"op": "spmm"}]
    assert len(stage_tables.tables(both)) == 2


def test_a_fused_launch_is_compared_with_summed_stages():
    row = a_stage_row(
        stages_us={"stage+gather": 6.0},
        predicted_us={"stage": 2.0, "gather": 2.0, "launch": 2.5},
        call_us=8.0,
    )
    (table,) = stage_tables.tables([row])
    assert table.columns[2:] == ["stage+gather", "sum", "launch", "call"]
    assert table.rows[0][2:] == ["6.0/4.0 1.50", "6.0/4.0 1.50", "2.0/2.5 0.80", "8.0/6.5 1.23"]


def test_predictions_are_those_of_the_same_kernel(monkeypatch):
    class Found:
        candidates = (
            Candidate(type("K", (), {"name": "cuda/gather"}), None, Estimate({"gather": 1.0}, 0.1)),
            Candidate(type("K", (), {"name": "cuda/tile"}), None, Estimate({"tiles": 2e-6}, 0.1)),
        )

    asked = []
    monkeypatch.setattr(
        stages.rk, "explain", lambda *args, **options: asked.append(options["backend"]) or Found
    )
    assert stages._predicted(Problem.of(CASE), "cuda/tile") == {"tiles": pytest.approx(2.0)}
    assert asked == ["cuda/tile"]


def test_the_command_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "stages.jsonl"
    options = ["--suite", "first", "--device", "cpu", "--out", str(out)]
    assert cli.main(["stages", *options, "--kernels", "cpu/portable", "--time-budget", "60"]) == 0
    said = capsys.readouterr().out
    assert "real:14.q_proj k256" in said
    assert {json.loads(line)["kernel"] for line in out.read_text().splitlines()} == {"cpu/portable"}
    out.unlink()
    assert cli.main(["stages", *options, "--kernels", "cpu/portable", "--bare"]) == 0
    said = capsys.readouterr().out
    assert "real:14.q_proj/576x576/k256/0.005998/float32/0 cpu/portable: called" in said
    assert not out.exists()


def test_a_run_appends_stages_and_prints_ratios_last(tmp_path, capsys):
    options = ("--suite", "first", "--device", "cpu", "--time-budget", "120", "--stages")
    assert run_bench(tmp_path, *options, "--kernels", "auto", "cpu/portable", "dense") == 0
    said = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "stages.jsonl"}
    assert said.rstrip().splitlines()[-1].strip().startswith("geometric mean: sddmm")
    assert said.count("How many times faster auto is than dense") == 2
