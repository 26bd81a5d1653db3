"""Where the time of our native kernels goes: each stage measured beside what is predicted for it.

Rows of their own, one per case and kernel, beside the results of a run: kernels_us by full name,
stages_us, predicted_us (of the defaults, also for an experiment), and call_us from end to end.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import rosa_kernels as rk
from bench.contenders.base import Contender, Problem
from bench.contenders.experiments import EARLY, kernel_of
from bench.layer.contenders import LayerContender
from bench.measuring import clocks, kernel_times
from bench.measuring.results import Row
from bench.report.tables import PRODUCTS, Table, geomean
from bench.run import runner
from bench.run.check import Check
from bench.suites.cases import case_id
from rosa_kernels.testing import Case

Plan = Sequence[tuple[Case, Sequence[Contender | LayerContender]]]

_SAMPLES = 15
_COLUMNS = ("kernel", "status", "reason", "timer", "call_us", "kernels_us", "stages_us")
_EMPTY: Row = dict.fromkeys((*_COLUMNS, "predicted_us"))


def measure(device: str, plan: Plan, base: Row, out: Path, end: float) -> list[Row]:
    """Rows of all cases that begin before `end`, each written to `out` as it comes."""
    profiler = kernel_times.Profiler(device)
    if profiler.missing is not None:
        print(f"Stages on {device} have no times: {profiler.missing}")
    chosen = _chosen(device, plan)
    rows: list[Row] = []
    for number, (case, contenders) in enumerate(chosen):
        if time.monotonic() > end:
            left = len(chosen) - number
            print(f"Stages of {left} of {len(chosen)} cases: not run, the time budget was spent")
            break
        new = [base | row for row in _case_rows(case, contenders, device, profiler)]
        _append(out, new)
        rows += new
        print(f"stages of {case_id(case)} in us: {', '.join(map(_line, new))}", flush=True)
        reason = runner.lost(device)
        if reason is not None:
            print(f"Stages end here: {device} was lost ({reason})")
            break
    return rows


def _line(row: Row) -> str:
    return f"{row['kernel']} {row['status'] if row['status'] != 'ok' else _us(row['call_us'])}"


def bare(device: str, plan: Plan, end: float) -> None:
    """Call every kernel once: nothing before it, no check, no profiler. For `ncu`.

    No case is begun after `end`: a profiler that is killed writes nothing.
    """
    for case, contenders in _chosen(device, plan):
        if time.monotonic() > end:
            return
        problem = Problem.of(case, device)
        for contender in contenders:
            reason = contender.reject(problem)
            if reason is None:
                contender.prepare(problem, contender.charges[-1])()
                if device != "cpu":
                    torch.cuda.synchronize()
            print(f"{case_id(case)} {contender.name}: {reason or 'called'}")


def _chosen(device: str, plan: Plan) -> list[tuple[Case, list[Contender]]]:
    """Our native kernels of the products.

    Launches that overlap are left out: a kernel's time then has its wait for the one ahead in it.
    """
    kept = [
        (
            case,
            [
                contender
                for contender in contenders
                if isinstance(contender, Contender)
                and contender.op in PRODUCTS
                and contender.backend == device
                and EARLY not in contender.name.split()
            ],
        )
        for case, contenders in plan
    ]
    return [(case, contenders) for case, contenders in kept if contenders]


def _case_rows(
    case: Case, contenders: Sequence[Contender], device: str, profiler: kernel_times.Profiler
) -> list[Row]:
    base = _EMPTY | runner.case_columns(case)
    try:
        problem = Problem.of(case, device)
        check = Check(problem)
    except Exception as error:  # the reason goes into every row of the case
        failed = runner.failure(error)
        return [base | {"kernel": contender.name} | failed for contender in contenders]
    base["nnz"] = problem.pattern.nnz
    return [
        base | {"kernel": contender.name} | _columns(contender, problem, check, profiler)
        for contender in contenders
    ]


def _columns(
    contender: Contender, problem: Problem, check: Check, profiler: kernel_times.Profiler
) -> Row:
    reason = contender.reject(problem)
    if reason is not None:
        return {"status": "unsupported", "reason": reason}
    columns: Row = {}
    try:
        columns["predicted_us"] = _predicted(problem, kernel_of(contender.name))
        call = contender.prepare(problem, contender.charges[-1])
        check(call())
        clock = clocks.clock_on(problem.device)
        clock(call, 2)
        samples = [clock(call, 1) for _ in range(_SAMPLES)]
        columns["call_us"] = statistics.median(samples) * 1e6
        columns["timer"] = clocks.timer_of(clock, call)
        columns["kernels_us"] = profiler.times(call)
        columns["stages_us"] = kernel_times.by_stage(columns["kernels_us"])
    except AssertionError as error:
        return columns | {"status": "incorrect", "reason": str(error)}
    except Exception as error:  # the row says what
        return columns | runner.failure(error)
    return columns | {"status": "ok", "reason": profiler.missing}


def _predicted(problem: Problem, kernel: str) -> dict[str, float] | None:
    case = problem.case
    asked = rk.explain(case.op, problem.pattern, k=case.k, dtype=case.dtype, backend=kernel)
    for found in asked.candidates:
        if found.kernel.name == kernel and found.estimate is not None:
            return {stage: seconds * 1e6 for stage, seconds in found.estimate.stages.items()}
    return None


def _append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


# -- table -----------------------------------------------------------------------------------------

Times = dict[str, tuple[float | None, float | None]]  # what -> measured, predicted


def tables(rows: Sequence[Row], limit: int | None = None) -> list[Table]:
    """For each op every stage of every kernel, and the geometric means of measured / predicted.

    `limit` bounds the lines beside the means.
    """
    made = []
    for op in PRODUCTS:
        own = [row for row in rows if row["status"] == "ok" and row["op"] == op]
        if own:
            made.append(_table(op, own, limit))
    return made


def _table(op: str, rows: Sequence[Row], limit: int | None) -> Table:
    lines = [(row, _times(row)) for row in rows]
    found = dict.fromkeys(what for _, times in lines for what in times)
    ends = ("sum", "launch", "call")
    stages = sorted(
        (what for what in found if what not in ends),
        key=lambda what: (*kernel_times.ORDER, what).index(what),
    )
    columns = [*stages, *(what for what in ends if what in found)]
    shown = lines[:limit]
    more = f"; the first {len(shown)} of {len(lines)}" if len(shown) < len(lines) else ""
    table = Table(
        f"Stages of {op} in us: measured/predicted and their ratio; launch: the call less its "
        f"kernels{more}",
        ["case", "kernel", *columns],
    )
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, times in lines:
        for what, (measured, predicted) in times.items():
            if measured and predicted and measured > 0:
                ratios[row["kernel"]][what].append(measured / predicted)
    for row, times in shown:
        case = f"{row['mask']} k{row['k']}"
        table.rows.append([case, row["kernel"], *(_cell(times.get(what)) for what in columns)])
    for kernel, by_stage in ratios.items():
        means = [f"{geomean(by_stage[what]):.2f}" if what in by_stage else "" for what in columns]
        table.rows.append(["geometric mean", kernel, *means])
    return table


def _times(row: Row) -> Times:
    measured: dict[str, float] = row["stages_us"]
    predicted: dict[str, float] = dict(row["predicted_us"] or {})
    launch = predicted.pop("launch", None)
    total = sum(predicted.values()) if predicted else None
    times: Times = {}
    for stage, us in measured.items():
        parts = [predicted.pop(part) for part in stage.split("+") if part in predicted]
        times[stage] = us, sum(parts) if parts else None
    # What is predicted and was not seen to run.
    times |= {stage: (None, us) for stage, us in predicted.items() if us > 0}
    spent = sum(measured.values()) if measured else None
    if spent is not None or total is not None:
        times["sum"] = spent, total
        times["launch"] = None if spent is None else row["call_us"] - spent, launch
    times["call"] = row["call_us"], None if total is None else total + (launch or 0.0)
    return times


def _cell(times: tuple[float | None, float | None] | None) -> str:
    measured, predicted = times or (None, None)
    if predicted is None:
        return "" if measured is None else _us(measured)
    if measured is None:
        return f"-/{_us(predicted)}"
    ratio = f" {measured / predicted:.2f}" if predicted else ""
    return f"{_us(measured)}/{_us(predicted)}{ratio}"


def _us(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
