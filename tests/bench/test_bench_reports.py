"""Reports from result rows: ratios, verdicts, targets, and the reasons of missing times."""

from __future__ import annotations

import collections

import pytest

from bench.report.rows import geomean, milliseconds, ratios_to_peers

pytest.importorskip("numpy")

from bench_rows import a_row, failed, gpu_rows
from conftest import sweep

from bench import __main__ as cli
from bench.measuring import console, results
from bench.measuring.names import FROM_TOKEN_MAJOR, OP
from bench.report import case_results, compare, ratios, tables, targets
from bench.suites import cases
from bench.suites.cases import case_id
from rosa_kernels.testing import Case
from rosa_train.cli.tables import Table


def test_ratios_geomeans_and_efficiency_are_derived_from_rows():
    rows = []
    for density, ours, dense, spops in ((0.01, 2.0, 100.0, 8.0), (0.05, 10.0, 100.0, 5.0)):
        common = {"case": f"d{density}", "density": density}
        rows += [
            a_row(**common, ms=ours),
            a_row(**common, kernel="dense", backend="torch", ms=dense),
            a_row(**common, kernel="spops", backend="spops", ms=spops),
            a_row(**common, kernel="cpu/portable", ms=50.0),
        ]
    found = ratios_to_peers(rows, FROM_TOKEN_MAJOR)
    assert sorted(r.value for r in found if r.peer["kernel"] == "spops") == [0.5, 4.0]
    assert {r.peer["kernel"] for r in found} == {"dense", "spops"}
    assert geomean([0.5, 4.0]) == pytest.approx(2**0.5)
    assert tables.efficiency(rows) == {("spmm", "float32", "uniform"): pytest.approx(0.5)}
    table = tables.losing_table(rows, FROM_TOKEN_MAJOR)
    assert [line[0] for line in table.rows] == ["d0.05"]
    assert "1 of 4 comparisons" in table.title


def test_overhead_is_the_op_minus_its_adapter():
    tiny = {"m": 32, "n": 32, "charge": OP}
    rows = [
        a_row(**tiny, mode="adapter", ms=0.005),
        a_row(**tiny, mode="no_grad", ms=0.015),
        a_row(**tiny, mode="grad", ms=0.025),
    ]
    assert tables.overheads(rows) == {
        "spmm": {"adapter": 5e-6, "no_grad": pytest.approx(1e-5), "grad": pytest.approx(2e-5)}
    }


def test_a_busy_machine_is_noted():
    noisy = a_row(samples_s=[0.001, 0.001, 0.009, 0.009])
    assert tables.noise_note([a_row()] * 30 + [noisy]) is None
    assert tables.noise_note([a_row()] * 3 + [noisy]).startswith("1 of 4 times vary")


def test_reasons_of_missing_points_are_listed():
    table = tables.status_table([failed("oom", kernel="dense", charge=OP)])
    assert table.rows == [["because", "oom", "1", "dense"]]


@pytest.mark.parametrize(
    ("ms", "spread", "verdict"),
    [(1.03, 0.01, "same"), (0.8, 0.01, "faster"), (1.3, 0.01, "slower"), (1.3, 0.5, "ambiguous")],
)
def test_verdicts(ms, spread, verdict):
    new = a_row(ms=ms) | {"p20_s": ms / 1e3 * (1 - spread), "p80_s": ms / 1e3 * (1 + spread)}
    (found,) = compare.compare([a_row(ms=1.0)], [new])
    assert found.verdict == verdict


def test_compare_reports_missing_rows_and_changed_statuses():
    base = [a_row(case="a"), a_row(case="b")]
    new = [failed("incorrect", case="b"), a_row(case="c")]
    verdicts = {item.row["case"]: item.verdict for item in compare.compare(base, new)}
    assert verdicts == {"a": "only in base", "b": "status changed", "c": "only in new"}


def test_times_of_different_timers_are_not_compared():
    for timers, verdict in (
        (("cold", "graph"), "other timer"),
        (("cold", "cold+host"), "other timer"),
        (("cold", "cold"), "slower"),
        ((None, "cold"), "slower"),  # rows from before timers were named
    ):
        base, new = (a_row(ms=i + 1.0, timer=timer) for i, timer in enumerate(timers))
        (found,) = compare.compare([base], [new])
        assert found.verdict == verdict
        assert compare.tables([found])[0].rows[0][4] == verdict


def test_times_that_include_the_host_are_marked():
    assert milliseconds(a_row(ms=2.0, timer="cold+host")) == "2.000+host"
    assert milliseconds(a_row(ms=2.0, timer="cold")) == "2.000"
    assert milliseconds(a_row(ms=2.0), 1) == "2.0"


# -- ratios and targets: all rows of a GPU are synthetic ------------------------------------------


def on_gpu(case: str, kernel: str, ms: float, **columns) -> results.Row:
    common = {"device": "cuda", "op": "sddmm", "dtype": "bfloat16", "k": 8192, "mask": "q_proj"}
    backend = {"auto": "cuda/tile", "rosa-dense": "dense"}.get(kernel, kernel)
    return a_row(**(common | {"backend": backend, **columns}), case=case, kernel=kernel, ms=ms)


def test_rows_of_different_devices_are_not_compared():
    rows = [a_row(), a_row(kernel="dense", ms=2.0), a_row(device="cuda", kernel="spops", ms=3.0)]
    assert [ratio.peer["kernel"] for ratio in ratios_to_peers(rows, FROM_TOKEN_MAJOR)] == ["dense"]
    assert {result.auto["device"] for result in case_results.case_results(rows)} == {"cpu"}


def test_a_case_result_keeps_each_familys_fastest_peer():
    rows = [
        on_gpu("a", "auto", 1.0),
        on_gpu("a", "cuda/tile", 1.1),
        on_gpu("a", "cuda/gather", 2.0),
        on_gpu("a", "rosa-dense", 0.5),
        on_gpu("a", "reference", 0.1),
        on_gpu("a", "dense", 3.0),
        on_gpu("a", "dense-reduced", 2.5),
        on_gpu("a", "cusparse-fp32", 9.0),
        on_gpu("a", "cusparse-fp32", 5.0, charge=OP),
    ]
    (result,) = case_results.case_results(rows)
    assert set(result.own) == {"cuda/tile", "cuda/gather", "dense"}
    assert result.best_own()["kernel"] == "rosa-dense"
    assert result.against("dense") == pytest.approx(2.5)
    assert result.against("cusparse") == pytest.approx(9.0)
    assert result.against("spops") is None


def test_autos_choice_is_judged_by_allowed_kernels_only():
    rows = [
        on_gpu("a", "auto", 2.0, op="spmm", backend="cuda/gather"),
        on_gpu("a", "auto-finite", 1.0, op="spmm", backend="cuda/tile"),
        on_gpu("a", "cuda/gather", 2.0, op="spmm"),
        on_gpu("a", "cuda/tile", 1.0, op="spmm"),  # it spreads Inf and NaN, so auto may not take it
    ]
    (result,) = case_results.case_results(rows)
    assert set(result.own) == {"cuda/gather"}
    assert not ratios.choices_table([result]).rows


def test_wrong_choices_are_listed_worst_first():
    rows = []
    for case, best in (("near", 0.97), ("bad", 0.5), ("worse", 0.25)):
        rows += [on_gpu(case, "auto", 1.0), on_gpu(case, "cuda/tile", 1.0)]
        rows.append(on_gpu(case, "cuda/gather", best))
    found = case_results.case_results(rows)
    table = ratios.choices_table(found)
    assert [line[0] for line in table.rows] == ["worse", "bad"]
    assert table.rows[0][1:] == ["cuda/tile", "1.000", "cuda/gather", "0.250", "4.00"]
    assert "2 of 3 cases" in table.title
    assert len(ratios.choices_table(found, limit=1).rows) == 1
    (line,) = ratios.own_table(found).rows
    assert line[2] == "2.02 (4.00)"
    assert line[3:] == ["cuda/tile 3", "cuda/gather 3"]


@pytest.mark.parametrize(
    ("density", "name"),
    [(0.0005, "< 0.2 %"), (0.003, "0.2-0.45 %"), (0.006, "0.45-0.8 %"), (0.1, ">= 3 %")],
)
def test_bands_of_density(density, name):
    assert ratios.band(density) == name


def verdicts(rows) -> dict[str, list[str]]:
    return {line[0]: line[1:] for line in targets.table(case_results.case_results(rows)).rows}


def test_targets_are_reached_missed_or_not_measured():
    rows = []
    for case, mask, density, dense in (
        ("generated", "q_proj", 0.006, 3.5),
        ("real", "real:14.q_proj", 0.006, 3.5),
        ("uniform", "uniform", 0.01, 0.9),
    ):
        common = {"mask": mask, "density": density}
        rows += [on_gpu(case, "auto", 1.0, **common), on_gpu(case, "dense", dense, **common)]
    found = verdicts(rows)
    reached = found["SDDMM, generated masks, 0.3-2 %: x dense + gather"]
    assert reached == ["mean 3", "3.50 (3.50)", "1", "reached"]
    assert found["SDDMM, replicated real masks: x dense + gather"][-1] == "missed"
    assert found["SDDMM, uniform masks: x the fastest peer"][1:] == [
        "0.90 (0.90)",
        "1",
        "missed",
    ]
    assert found["SDDMM, real-like masks: x spops"] == ["mean 8", "-", "0", "not measured"]


def test_targets_are_of_one_gpu_only():
    assert not targets.table(
        case_results.case_results([a_row(), a_row(kernel="dense", ms=9.0)])
    ).rows


def test_the_floor_of_scattered_adds_counts_sectors():
    # The 16 elements of w, of 16 bits each, lie in one sector of 32 bytes.
    row = a_row(op="csr_add_", m=1, n=16, nnz=16, density=1.0, dtype="bfloat16")
    copy = a_row(op="roof", kernel="copy", bytes=10**9, ms=1.0)  # 1 GB per ms
    traffic = 2 * 32 + 16 * (4 + 2) + 4 * 2
    assert targets.scattered_floor_s(row, copy) == pytest.approx(traffic * 1e-12)


def test_the_roofs_are_a_table():
    rows = gpu_rows([])
    rows.append(a_row(op="roof", kernel="gemm", m=8192, n=8192, k=8192, flops=10**12, ms=1.25))
    lines = {line[0]: line[1] for line in tables.roof_table(rows).rows}
    assert lines["copy, read and written"] == "4000 GB/s"
    assert lines["L2 cache, read"] == "5000 GB/s"
    assert lines["float32 GEMM, 8192x8192x8192"] == "800 TFLOP/s"
    assert lines["kernel launch, one after the other"] == "2.00 us"


def test_ratios_are_taken_over_several_files_together(tmp_path, capsys):
    suite = [case for case in cases.suite("quick", device="cuda") if case.m > 64]
    half = len(suite) // 2
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(paths, (suite[:half], suite[half:]), strict=True):
        results.append(path, gpu_rows(part))
    assert cli.main(["ratios", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "cuda, sddmm, bfloat16, generated, 0.45-0.8 %, 8192" in out
    assert "auto against the best of our own kernels" in out
    assert "Targets on one GPU" in out
    assert "SDDMM, generated masks, 0.3-2 %: x dense + gather" in out


def test_the_short_table_fits_a_screen():
    rows = []
    for name in ("first", "second"):
        suite = cases.suite(name, device="cuda")
        made = gpu_rows(suite)
        lines = ratios.short_table(made).text().splitlines()
        assert len(lines) <= 27
        assert max(map(len, lines)) <= 140
        rows += made
    table = ratios.short_table(rows)
    by_case = {line[0]: line[1:] for line in table.rows}
    (q_proj,) = (line for case, line in by_case.items() if "real:14.q_proj" in case)
    assert q_proj[0] == "cuda/tile"
    assert float(q_proj[2]) > 1
    assert "geometric mean: sddmm, 21 real masks" in by_case
    assert "geometric mean: spmm real k8" in by_case
    assert by_case["geometric mean: csr_add_"][2:5] == ["-", "-", "3.00 torch"]


def test_the_short_table_marks_host_times_and_gaps():
    common = {"mask": "real:14.q_proj", "charge": FROM_TOKEN_MAJOR}
    rows = [
        on_gpu("a", "auto", 1.0, **common),
        on_gpu("a", "dense", 3.0, **common),
        on_gpu("a", "cusparse-fp32", 9.0, timer="cold+host", **common),
        on_gpu("a", "cuda/tile panels=32", 0.1, mode="experiment", **common),
        on_gpu("a", "cuda/wgmma", 1.1, backend="cuda/wgmma", **common),
    ]
    (line, _) = ratios.short_table(rows).rows
    assert line[1:] == ["cuda/tile", "1.000", "3.00", "9.00+host", "-", "cuda/wgmma", "1.100"]
    missing = [
        failed("incorrect", case="b", charge=OP),
        *(failed("unsupported", case=c, charge=OP) | {"reason": "not run: spent"} for c in "cd"),
    ]
    assert ratios.untimed(rows + missing) == [
        "auto was not timed, 1 x: b: incorrect, because",
        "auto was not timed, 2 x: unsupported, not run: spent",
    ]


def test_ratios_without_a_single_case_are_refused(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results.append(path, gpu_rows([]))
    with pytest.raises(SystemExit):
        cli.main(["ratios", str(path)])
    assert "expected timed rows to compare, got none" in capsys.readouterr().err


def test_synthetic_rows_follow_the_schema(tmp_path):
    rows = gpu_rows([Case("csr_add_", 64, 64, 1, 0.1), Case("sddmm", 64, 64, 8, 0.1)])
    results.append(tmp_path / "results.jsonl", rows)
    assert results.read(tmp_path / "results.jsonl") == rows


@sweep(width=[60, 80, 100])
def test_narrow_tables_cut_no_cell(width):
    suite = cases.suite("second", device="cuda")
    rows = [
        row | {"case": case_id(suite[0])} if row["op"] == "sddmm" else row
        for row in gpu_rows(suite)
    ]
    made = [
        *tables.summary(rows),
        *tables.case_tables(rows),
        *ratios.tables(rows),
        ratios.short_table(rows),
        *compare.tables(compare.compare(rows, [row | {"p20_s": 9, "median_s": 9} for row in rows])),
        tables.status_table([failed("oom", charge=OP) | {"reason": "no " * 60}]),
        Table("T", ["name", "nothing"], [["a", ""]]),
    ]
    assert len(made) > 12
    for table in made:
        lines = console.narrow(table, width).splitlines()
        assert max(map(len, lines)) <= width
        words = " ".join(lines).split()
        for cells in (table.columns, *table.rows):
            assert not collections.Counter(" ".join(cells).split()) - collections.Counter(words)


def test_a_table_aligns_text_left_and_numbers_right():
    table = Table("Title", ["name", "kind", "ms"], [["a", "long kind", "1.5"]], texts=2)
    assert table.text() == "Title\n  name  kind        ms\n  a     long kind  1.5"
    markdown = "| name | kind | ms |\n| --- | --- | ---: |\n| a | long kind | 1.5 |\n"
    assert table.markdown() == markdown
