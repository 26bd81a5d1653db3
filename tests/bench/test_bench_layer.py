"""The benchmark of layers in training: equal budgets, its checks, memory, tables and plots."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial

import pytest
import torch

from bench.measuring.names import dtype_name

pytest.importorskip("numpy")

from bench_cases import FAST, replace_suite, run_bench
from bench_rows import a_row, failed

from bench import __main__ as cli
from bench.layer import contenders as layer_contenders
from bench.layer import memory
from bench.layer.case import FWD_BWD, MODES, STEP, LayerProblem, layer_case, model_case
from bench.layer.check import Check
from bench.layer.parametrization import TooFewEntries
from bench.layer.step import step_of
from bench.measuring import results
from bench.report import layer
from bench.run import runner
from bench.suites import cases

TINY = layer_case(48, 40, 16, rank=4, modes=(FWD_BWD, STEP))
NUMBERS = {"peak_bytes": 1, "held_bytes": 2, "live_bytes": 3, "saved_bytes": 4}
HAS_PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture(autouse=True)
def no_children(monkeypatch):
    """Replaces the memory meter. Its child process takes seconds, and has a test of its own."""
    monkeypatch.setattr("bench.layer.runner.MemoryMeter", lambda: lambda *args: dict(NUMBERS))


def contender(name: str, case=TINY, mode=FWD_BWD) -> layer_contenders.LayerContender:
    return next(c for c in cases.contenders(case) if (c.name, c.mode) == (name, mode))


# -- what is compared ------------------------------------------------------------------------------


def test_all_methods_but_full_match_loras_parameter_count():
    for case in cases.suite("layer"):
        if case.op != "rosa_layer":
            continue
        problem = LayerProblem(dataclasses.replace(case, k=1))
        budget = case.rank * (case.m + case.n)
        for kind in ("lora", "rosa", "sparse", "cla"):
            try:
                parametrization = problem.specs["linear"].parametrization(kind)
            except TooFewEntries:
                assert (kind, case.mask) == ("sparse", "real:14.down_proj")
                continue
            trainable = parametrization.trainable((case.m, case.n))
            if kind == "cla":  # a whole number of columns
                assert budget - case.m < trainable <= budget
            else:
                assert trainable == budget


def test_the_suites_cover_the_shapes_of_promised_speeds():
    def promised(device):
        found = set()
        for case in cases.suite("layer", device=device):
            row = {"device": device, "dtype": dtype_name(case.dtype)}
            row |= {key: getattr(case, key) for key in ("op", "m", "n", "k", "dropout")}
            if layer.promised(row):
                found |= {(case.m, case.n, case.k, mode) for mode in case.modes}
        return found

    assert promised("cpu") == {(2048, 2048, 512, mode) for mode in MODES}
    for shape in ((4096, 4096, 8192), (11008, 4096, 8192)):
        assert {(*shape, FWD_BWD), (*shape, STEP)} <= promised("cuda")
    for device in ("cpu", "cuda"):
        suite = cases.suite("layer", device=device)
        assert {case.dropout for case in suite} == {0.0, 0.05}
        assert any(case.op == "rosa_model" and STEP in case.modes for case in suite)


def test_a_real_mask_is_thinned_but_never_filled():
    spec = LayerProblem(layer_case(576, 1536, 1, "real:14.down_proj", rank=4)).specs["linear"]
    whole = spec.pattern(5308)
    part = spec.pattern(4224)
    assert part.nnz == 4224
    at = {
        pattern: set((pattern.row_indices * 1536 + pattern.col_indices).tolist())
        for pattern in (whole, part)
    }
    assert at[part] < at[whole]
    with pytest.raises(TooFewEntries, match=r"has 5308 entries; the budget asks for 5309"):
        spec.pattern(5309)


# -- correct before timed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        layer_case(48, 40, 16, rank=4, dropout=0.25),
        layer_case(48, 40, 16, rank=4, dtype=torch.bfloat16),
        layer_case(576, 1536, 8, "real:14.down_proj", rank=4),
    ],
    ids=["float32", "dropout", "bfloat16", "real"],
)
def test_every_contender_is_right_or_gives_a_reason(case):
    rows = runner.run_case(case, cases.contenders(case), FAST)
    for row in rows:
        name = row["kernel"]
        if row["status"] == "unsupported":
            peft = name.startswith("peft") and not HAS_PEFT
            assert peft or (case.mask != "uniform" and name in ("spa", "peft-super", "peft-shira"))
            continue
        assert row["status"] == "ok", (name, row["mode"], row["reason"])
        assert 0 < row["max_err"] < (1e-2 if case.is_16_bit else 1e-5)
        assert row["dropout"] == case.dropout
        assert {key: row[key] for key in NUMBERS} == NUMBERS
    timed = {row["kernel"] for row in rows if row["status"] == "ok"}
    assert {"rosa", "rosa-scatter", "rosa-separate", "lora", "cla", "full", "frozen"} <= timed
    assert not HAS_PEFT or {"peft-lora", "peft-supra"} <= timed


def test_a_layer_case_makes_rows_of_the_schema(tmp_path):
    rows = runner.run_case(TINY, cases.contenders(TINY), FAST)
    by_key = {(row["kernel"], row["mode"]): row for row in rows}
    assert by_key["rosa", FWD_BWD]["case"] == "rosa_layer/uniform/48x40/k16/0.0916667/float32/0/r4"
    assert by_key["rosa", FWD_BWD]["nnz"] == 176
    assert [by_key[name, STEP]["rank"] for name in ("lora", "rosa", "spa")] == [4, 2, 0]
    assert ("frozen", STEP) not in by_key  # nothing trains
    results.append(
        tmp_path / "r.jsonl",
        [a_row() | {k: v for k, v in row.items() if v is not None} for row in rows],
    )
    assert len(results.read(tmp_path / "r.jsonl")) == len(rows)


def wrong(change, part):
    """An adapt function in which `change` is applied to the gradient of parameter `part`."""

    def adapt(root, parametrizations, dropout):
        adapted = contender("rosa").adapt(root, parametrizations, dropout)
        adapted.trained["linear"][part].register_hook(change)
        return adapted

    return adapt


@pytest.mark.parametrize("part", ["a", "b", "values"])
def test_a_wrong_gradient_is_incorrect_and_not_timed(part):
    def change(grad):
        grad = grad.clone()
        grad.view(-1)[-1] += 1e-3 * grad.abs().max()
        return grad

    competing = [dataclasses.replace(contender("rosa"), adapt=wrong(change, part))]
    (row,) = runner.run_case(TINY, competing, FAST)
    assert row["status"] == "incorrect"
    assert row["reason"].startswith(f"{part}: 1 of")
    assert row["median_s"] is None


def test_a_stale_weight_after_the_step_is_incorrect():
    def adapt(root, parametrizations, dropout):
        adapted = contender("rosa").adapt(root, parametrizations, dropout)
        return dataclasses.replace(adapted, attach=partial(attach_and_undo, adapted))

    def attach_and_undo(adapted, optimizer):
        handle = adapted.attach(optimizer)
        weight = adapted.module.linear.weight
        stale = weight.detach().clone()
        optimizer.register_step_post_hook(lambda *_: weight.data.copy_(stale))
        return handle

    competing = [dataclasses.replace(contender("rosa", mode=STEP), adapt=adapt)]
    (row,) = runner.run_case(TINY, competing, FAST)
    assert row["status"] == "incorrect"


def test_a_raising_contender_does_not_stop_the_others():
    def adapt(root, parametrizations, dropout):
        raise RuntimeError("no such layer")

    competing = [dataclasses.replace(contender("rosa"), adapt=adapt), contender("lora")]
    broken, right = runner.run_case(TINY, competing, FAST)
    assert (broken["status"], broken["reason"]) == ("error", "RuntimeError: no such layer")
    assert right["status"] == "ok"


def test_without_peft_its_contenders_are_unsupported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = runner.run_case(TINY, cases.contenders(TINY), FAST)
    peft = [row for row in rows if row["backend"] == "peft"]
    assert {row["kernel"] for row in peft} == {
        "peft-lora",
        "peft-supra",
        "peft-super",
        "peft-shira",
    }
    assert {(row["status"], row["reason"]) for row in peft} == {
        ("unsupported", "peft is not installed")
    }


def test_the_model_is_right_in_a_whole_step():
    pytest.importorskip("transformers")
    case = model_case(64, rank=2)
    problem = LayerProblem(case)
    assert len(problem.specs) == 28
    check = Check(problem)
    for name in ("rosa", "lora"):
        found = contender(name, case, STEP)
        parametrizations = found.parametrizations(problem)
        adapted = found.build(problem, parametrizations)
        step = step_of(problem, adapted, STEP)
        assert check(adapted, parametrizations) < 1e-4
        step.step_visibly()
        now = {
            key: parametrization.updated(adapted.trained[key])
            for key, parametrization in parametrizations.items()
        }
        assert check(adapted, now) < 1e-4
        with pytest.raises(AssertionError, match="of its norm"):
            check(adapted, parametrizations)  # the weights have changed


# -- memory ----------------------------------------------------------------------------------------


def test_live_peak_counts_tensor_bytes_exactly():
    def call():
        first = torch.empty(10_000, dtype=torch.uint8)
        del first
        second = torch.empty(50_000, dtype=torch.uint8)
        third = torch.empty(7_000, dtype=torch.uint8)
        return second, third

    assert memory.live_peak(call) == 57_000


def test_saved_bytes_are_the_inputs_and_the_projections():
    problem = LayerProblem(TINY)
    x, projected = problem.x.nbytes, 16 * 4
    for name, rank in (("lora", 4), ("rosa", 2), ("cla", None)):
        found = contender(name)
        parametrizations = found.parametrizations(problem)
        got = memory.saved_bytes(problem, found.build(problem, parametrizations))
        if rank is None:  # a selector saves its columns only
            assert got < x
        else:
            assert x + rank * projected <= got
            pattern = parametrizations["linear"].pattern
            indices = 0 if pattern is None else 4 * (pattern.nnz + 49)
            assert got <= x + rank * projected + indices + 64


@pytest.mark.slow
def test_page_and_tensor_peaks_agree_in_a_subprocess():
    case = layer_case(1024, 1024, 256)
    meter = memory.MemoryMeter()
    found = {
        name: meter(case, name, FWD_BWD, "cpu", 1) for name in ("lora", "rosa", "full", "frozen")
    }
    weight = 4 * 1024 * 1024
    for columns in found.values():
        assert columns["held_bytes"] >= weight
        if columns["peak_bytes"] is not None:
            assert columns["peak_bytes"] == pytest.approx(columns["live_bytes"], rel=0.1, abs=2**18)
    assert found["frozen"]["live_bytes"] >= 2 * 4 * 256 * 1024  # output and input gradient
    # RoSA needs no temporary of the weight's size. Full fine-tuning needs one.
    assert found["rosa"]["live_bytes"] < found["frozen"]["live_bytes"] + weight
    assert found["full"]["live_bytes"] >= found["frozen"]["live_bytes"] + weight


# -- tables, targets, plots ------------------------------------------------------------------------


def layer_rows(**times) -> list[results.Row]:
    """Made-up rows of the promised shape. rosa is 1 % slower than lora, and 2 % larger."""
    times = {
        "lora": 10.0,
        "rosa": 10.1,
        "full": 14.0,
        "peft-lora": 10.5,
        "peft-supra": 20.0,
    } | times
    sizes = {"rosa": 102, "full": 250, "peft-supra": 180}
    rows = []
    for mode in (FWD_BWD, STEP):
        for name, ms in times.items():
            columns = {"op": "rosa_layer", "m": 2048, "n": 2048, "k": 512, "charge": "op"}
            columns |= {"case": "rosa_layer/uniform/2048x2048/k512/0.0078125/float32/0/r16"}
            size = 10**6 * sizes.get(name, 100)
            columns |= {"held_bytes": size // 2, "live_bytes": size // 2, "saved_bytes": 1}
            columns |= {"dropout": 0.0, "trainable": 65536, "mode": mode}
            rows.append(a_row(**columns, kernel=name, ms=ms))
    return [*rows, failed("unsupported", **{**columns, "kernel": "peft-shira"})]


def verdicts(rows) -> dict[str, list[str]]:
    return {row[0]: row[2:] for row in layer.target_table(layer.groups(rows)).rows}


def test_targets_are_reached_missed_or_not_measured():
    found = verdicts(layer_rows())
    assert found["cpu: layer, forward + backward: time over our LoRA's"][::2] == [
        "1.010 (1.010)",
        "reached",
    ]
    assert found["cpu: layer, forward + backward: time over PEFT Super-Tuning's"][-1] == "reached"
    assert found["cpu: layer, forward + backward: time over PEFT SHiRA's"][-1] == "not measured"
    assert found["cpu: layer, step: time over full fine-tuning's"][::2] == [
        "0.721 (0.721)",
        "reached",
    ]
    assert found["cpu: peak training memory over our LoRA's"][0] == "1.020 (1.020)"
    assert found["cpu: model, step: time over full fine-tuning's"][-1] == "not measured"
    slow = verdicts(layer_rows(rosa=10.6))
    assert slow["cpu: layer, forward + backward: time over our LoRA's"][-1] == "missed"
    assert slow["cpu: layer, step: time over full fine-tuning's"][-1] == "missed"


def test_the_table_also_shows_where_rosa_loses():
    first, *_ = layer.tables(layer_rows(rosa=12.0))
    order = [row[0] for row in first.rows]
    assert order[:4] == ["lora", "peft-lora", "rosa", "full"]
    rosa = first.rows[2]
    assert rosa[4:6] == ["1.200", "1.143"]
    assert rosa[-1] == "1.020"
    second = layer.tables(layer_rows())[1]
    assert ["peft-shira", "-", "-", "-", "unsupported"] in [row[:5] for row in second.rows]


def test_the_command_line_handles_layers(tmp_path, capsys, monkeypatch):
    replace_suite(monkeypatch, "layer", TINY)
    options = ["--suite", "layer", "--ops", "rosa_layer"]
    options += ["--without", "peft-lora", "peft-supra", "peft-super", "peft-shira"]
    assert run_bench(tmp_path, *options) == 0
    path = str(tmp_path / "results.jsonl")
    assert "r4, fwd_bwd, cpu" in capsys.readouterr().out
    for command in ("ratios", "report"):
        assert cli.main([command, path]) == 0
        out = capsys.readouterr().out
        assert "Targets of a RoSA layer" in out
        assert "rosa-separate" in out
    assert cli.main(["list", "--suite", "layer"]) == 0
    assert "rosa-scatter [step]" in capsys.readouterr().out
    assert cli.main(["compare", path, path]) == 0


def test_files_without_the_layer_columns_can_be_read(tmp_path):
    path = tmp_path / "old.jsonl"
    results.append(path, [a_row()])
    lines = path.read_text()
    for column in results.LAYER_COLUMNS:
        lines = lines.replace(f', "{column}": null', "")
    path.write_text(lines)
    assert "trainable" not in lines
    assert results.read(path) == [a_row()]


def test_time_and_memory_are_drawn_relative_to_lora(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    names = {path.name for path in plot.draw_all(layer_rows(rosa=31.0), tmp_path)}
    stem = "rosa_layer_uniform_2048x2048_k512_float32_r16_fwd_bwd"
    assert {f"{stem}.png", f"{stem}.svg"} <= names
    text = (tmp_path / f"{stem}.svg").read_text()
    assert "time over LoRA's" in text
    assert "peak training memory over LoRA's" in text
    assert "3.10 →" in text  # outside the panel, so its value is written
