"""Times each stage of our native kernels, beside its predicted time.

The rows have a file and columns of their own: one row per case and kernel, with kernels_us by full
name, stages_us, predicted_us and call_us, the time of the whole call. predicted_us assumes the
default settings, also in the row of an experiment.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import rosa_kernels as rk
from rosa_kernels.testing import Case

from ..contenders.base import Contender, Problem
from ..contenders.experiments import EARLY, kernel_of
from ..layer.contenders import LayerContender
from ..measuring import clocks, kernel_times
from ..measuring.names import PRODUCTS
from ..measuring.results import Row
from ..report.stages import microseconds
from ..suites.cases import case_id
from . import runner
from .check import Check

Plan = Sequence[tuple[Case, Sequence[Contender | LayerContender]]]

_SAMPLES = 15
_COLUMNS = ("kernel", "status", "reason", "timer", "call_us", "kernels_us", "stages_us")
_EMPTY: Row = dict.fromkeys((*_COLUMNS, "predicted_us"))


def measure(device: str, plan: Plan, base: Row, out: Path, end: float) -> Iterator[Row]:
    """Rows of all cases that begin before `end`. Each row is written to `out` at once."""
    _append(out, [])  # fails now, not after minutes, if rows cannot be written
    profiler = kernel_times.Profiler(device)
    if profiler.missing is not None:
        print(f"Stages on {device} have no times: {profiler.missing}")
    chosen = _chosen(device, plan)
    for number, (case, contenders) in enumerate(chosen):
        if time.monotonic() > end:
            left = len(chosen) - number
            print(f"Stages of {left} of {len(chosen)} cases: not run, the time budget was spent")
            break
        new = [base | row for row in _case_rows(case, contenders, device, profiler)]
        _append(out, new)
        print(f"stages of {case_id(case)} in us: {', '.join(map(_line, new))}", flush=True)
        yield from new
        reason = runner.lost(device)
        if reason is not None:
            print(f"Stages end here: {device} was lost ({reason})")
            break


def _line(row: Row) -> str:
    ok = row["status"] == "ok"
    return f"{row['kernel']} {microseconds(row['call_us']) if ok else row['status']}"


def bare(device: str, plan: Plan, end: float) -> None:
    """Call every kernel once, without warm-up, check or profiler. For `ncu`.

    No case begins after `end`, because a profiler that is killed writes nothing.
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
    """The cases of SDDMM and SpMM with our native kernels for the device.

    Kernels with overlapping launches are left out: a kernel's time would include its wait for the
    launch ahead of it.
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
    except Exception as error:  # the row has the reason
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
