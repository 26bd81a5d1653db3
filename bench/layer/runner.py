"""Runs one case of a layer: checks contenders, measures their memory, times the correct ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..measuring import clocks, timing
from ..measuring.results import Row
from .case import FWD_BWD, LayerCase, LayerProblem
from .check import Check
from .contenders import LayerContender
from .memory import MemoryMeter
from .step import Step, quiet, step_of

MeasureMemory = Callable[[LayerCase, str, str, str, int], Row]


@dataclass
class _Entry:
    contender: LayerContender
    columns: Row = field(default_factory=dict)
    call: Step | None = None
    estimate: float = 0.0


def run_case(
    case: LayerCase,
    competing: Sequence[LayerContender],
    rule: timing.StoppingRule,
    device: str,
    failure: Callable[[Exception], Row],
    measure_memory: MeasureMemory | None = None,
    timer: str = clocks.COLD,
) -> list[Row]:
    """The columns of all contenders of a case, without the case's own columns, in the given order.

    A contender is checked before its step and after it. Then its memory is measured. The correct
    ones are timed in turns. `failure` makes the columns of an exception.
    """
    entries = [_Entry(contender) for contender in competing]
    with quiet():
        try:
            problem = LayerProblem(case, device)
            check = Check(problem)
        except Exception as error:  # the reason goes into every row of the case
            return [_columns(entry, failure(error)) for entry in entries]
        for entry in entries:
            _examine(entry, problem, check, failure, measure_memory or MemoryMeter())
        calls = {str(i): e.call for i, e in enumerate(entries) if e.call is not None}
        estimates = {str(i): e.estimate for i, e in enumerate(entries)}
        try:
            timed = timing.interleaved(calls, rule, clocks.clock_on(device, timer), estimates)
        except Exception as error:  # one failed after it had passed; all lose their times
            for entry in entries:
                if entry.call is not None:
                    entry.columns |= failure(error)
        else:
            for i, samples in timed.items():
                entries[int(i)].columns |= timing.time_columns(samples)
    return [_columns(entry, {}) for entry in entries]


def _examine(
    entry: _Entry,
    problem: LayerProblem,
    check: Check,
    failure: Callable[[Exception], Row],
    measure_memory: MeasureMemory,
) -> None:
    """Build a contender, check it, measure its memory. Only a correct one gets a call to time."""
    contender, case = entry.contender, problem.case
    reason = contender.reject(problem)
    if reason is not None:
        entry.columns = {"status": "unsupported", "reason": reason}
        return
    try:
        parametrizations = contender.parametrizations(problem)
        entry.columns = size_columns(contender, problem)
        adapted = contender.build(problem, parametrizations)
        call = step_of(problem, adapted, contender.mode)
        worst = check(adapted, parametrizations)
        if contender.mode != FWD_BWD:
            call.step_visibly()
            now = {
                name: parametrization.updated(adapted.trained[name])
                for name, parametrization in parametrizations.items()
            }
            worst = max(worst, check(adapted, now))
        entry.columns["max_err"] = worst
        entry.columns |= measure_memory(
            case, contender.name, contender.mode, problem.device, torch.get_num_threads()
        )
        start = time.perf_counter()
        call()
        entry.estimate = time.perf_counter() - start
        entry.call = call
    except AssertionError as error:
        entry.columns |= {"status": "incorrect", "reason": str(error)}
    except Exception as error:  # a peer may raise anything; the row has the reason
        entry.columns |= failure(error)


def size_columns(contender: LayerContender, problem: LayerProblem) -> Row:
    """The number of trained parameters, and the least flops of forward and backward."""
    tokens, trainable, nnz, flops = problem.case.k, 0, 0, 0
    parametrizations = contender.parametrizations(problem)
    for name, parametrization in parametrizations.items():
        m, n = problem.specs[name].weight.shape
        trainable += parametrization.trainable((m, n))
        nnz += parametrization.nnz
        flops += (6 if "weight" in parametrization.trains else 4) * tokens * m * n
        if parametrization.selector is not None:
            flops += 6 * tokens * parametrization.rank * m
        elif parametrization.rank:
            flops += 6 * tokens * parametrization.rank * (m + n)
        flops += 2 * tokens * parametrization.nnz
    ranks = {parametrization.rank for parametrization in parametrizations.values()}
    rank = ranks.pop() if len(ranks) == 1 else None
    return {"nnz": nnz, "rank": rank, "trainable": trainable, "flops": flops}


def _columns(entry: _Entry, more: dict[str, Any]) -> Row:
    return entry.columns | more
