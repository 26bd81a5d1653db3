"""Runs one case: builds it, checks every contender, times the correct ones, makes the rows."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rosa_kernels.testing import Case

from ..contenders.base import Contender, Problem, Run, Unsupported
from ..contenders.overhead import is_overhead
from ..layer.case import LayerCase
from ..layer.contenders import LayerContender
from ..layer.runner import run_case as run_layer_case
from ..measuring import clocks, timing
from ..measuring.memory import with_peak
from ..measuring.names import dtype_name
from ..measuring.results import COLUMNS, Row
from ..suites.cases import case_id
from . import roofs
from .check import Check
from .sizes import size_columns

# Slower calls are not repeated just to measure their memory: that would cost the quick suite 20 s.
_REPEAT_BELOW_S = 0.1
_EMPTY: Row = dict.fromkeys(COLUMNS)
_OOM_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class _Entry:
    """One timed call: a contender, and the charges that it has rows for."""

    contender: Contender | LayerContender
    charges: tuple[str, ...]
    columns: Row = field(default_factory=dict)
    call: Run | None = None
    estimate: float = 0.0


def run_case(
    case: Case,
    contenders: Sequence[Contender | LayerContender],
    rule: timing.StoppingRule,
    device: str = "cpu",
    timer: str = clocks.COLD,
) -> list[Row]:
    """Rows for all contenders of a case. Every row has a status, and a failed one has a reason.

    A call is timed only after its result has passed the check. The two charges of a peer are
    checked separately, because a conversion can be wrong too. `timer` is for CUDA: "cold", "hot",
    "graph".
    """
    if isinstance(case, LayerCase):
        if timer == clocks.GRAPH:
            return skipped(case, contenders, "a layer in training is not captured in a graph")
        found = run_layer_case(case, contenders, rule, device, failure, timer=timer)
        entries = [
            _Entry(contender, contender.charges, columns)
            for contender, columns in zip(contenders, found, strict=True)
        ]
        return _rows(_EMPTY | case_columns(case), entries)
    with quiet_torch():
        return _run_case(case, contenders, rule, device, _timer(case, device, timer))


def _timer(case: Case, device: str, asked: str) -> str:
    return clocks.HOST if device == "cpu" or is_overhead(case) else asked


def _run_case(
    case: Case, contenders: Sequence[Contender], rule: timing.StoppingRule, device: str, timer: str
) -> list[Row]:
    base = _EMPTY | case_columns(case)
    entries = [
        _Entry(contender, charges)
        for contender in contenders
        for charges in ([contender.charges] if contender.token_major else _each(contender.charges))
    ]
    try:
        problem = Problem.of(case, device)
        check = Check(problem)
    except Exception as error:  # the reason goes into every row of the case
        for entry in entries:
            entry.columns = failure(error)
        return _rows(base, entries)
    base["nnz"] = problem.pattern.nnz
    for entry in entries:
        _examine(entry, problem, check, timer)
    calls = {str(i): e.call for i, e in enumerate(entries) if e.call is not None}
    estimates = {str(i): e.estimate for i, e in enumerate(entries)}
    try:
        timed = timing.interleaved(calls, rule, clocks.clock_on(device, timer), estimates)
    except Exception as error:  # one failed after it had passed; all lose their times
        for entry in entries:
            if entry.call is not None:
                entry.columns |= failure(error)
        return _rows(base, entries)
    for i, samples in timed.items():
        entries[int(i)].columns |= timing.time_columns(samples)
    return _rows(base, entries)


def warm_up(contenders: Iterable[Contender | LayerContender], device: str) -> None:
    """Call each contender once on a tiny problem.

    Libraries and thread pools thus start before the first row.
    """
    for contender in contenders:
        if isinstance(contender, LayerContender):
            continue  # makes three steps of its own before its first sample
        # A contender that fails here fails again in its row, which has the reason.
        with quiet_torch(), contextlib.suppress(Exception):
            problem = Problem.of(Case(contender.op, 64, 64, 64, 0.05), device)
            if contender.reject(problem) is None:
                contender.prepare(problem, contender.charges[-1])()


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Suppress torch's notices that sparse CSR is in beta and its invariants are unchecked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        yield


def skipped(case: Case, contenders: Sequence[Contender | LayerContender], reason: str) -> list[Row]:
    """Rows of a case that was not run, so that no case is missing without a reason."""
    entries = [
        _Entry(contender, contender.charges, {"status": "unsupported", "reason": reason})
        for contender in contenders
    ]
    return _rows(_EMPTY | case_columns(case), entries)


def roof_rows(dtypes: Sequence[torch.dtype], rule: timing.StoppingRule, device: str) -> list[Row]:
    """The roofs of a device, as full rows."""
    return [_EMPTY | row for row in roofs.roof_rows(dtypes, rule, device)]


def lost(device: str) -> str | None:
    """Why a device accepts no more work, or None if it does.

    A kernel that accesses memory out of bounds destroys the CUDA context of the process. Every
    later call then fails with the same error, although it is correct.
    """
    if device == "cpu":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _examine(entry: _Entry, problem: Problem, check: Check, timer: str) -> None:
    """Prepare a contender, check it, measure its memory. Only a correct one gets a call to time."""
    contender = entry.contender
    reason = contender.reject(problem)
    if reason is not None:
        entry.columns = {"status": "unsupported", "reason": reason}
        return
    try:
        entry.columns = size_columns(problem, contender)
        if contender.serves is not None:
            entry.columns["backend"] = contender.serves(problem)
        call = contender.prepare(problem, entry.charges[0])
        held = getattr(call, "workspace_bytes", None)
        if held is not None:  # allocated in `prepare`, before the peak is measured
            entry.columns["workspace_bytes"] = held
        got, entry.columns["peak_bytes"], entry.estimate = _watched(call, problem.device)
        entry.columns["max_err"] = check(got)
        del got
        if entry.estimate < _REPEAT_BELOW_S:
            # The first call may have built something that is kept, such as a plan. The second call
            # shows what every call needs.
            _, entry.columns["peak_bytes"], entry.estimate = _watched(call, problem.device)
        entry.call = clocks.captured(call) if timer == clocks.GRAPH else call
    except Unsupported as error:
        entry.columns |= {"status": "unsupported", "reason": str(error)}
    except AssertionError as error:
        entry.columns |= {"status": "incorrect", "reason": str(error)}
    except Exception as error:  # a peer may raise anything; the row has the reason
        entry.columns |= failure(error)


def _watched(call: Run, device: str) -> tuple[Tensor, int | None, float]:
    start = time.perf_counter()
    got, peak = with_peak(call, device)
    return got, peak, time.perf_counter() - start


def failure(error: Exception) -> Row:
    """The columns of a row whose contender raised."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    oom = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error).lower() for words in _OOM_TEXTS
    )
    if oom and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the next contender may need this memory
    return {"status": "oom" if oom else "error", "reason": text}


def _rows(base: Row, entries: Sequence[_Entry]) -> list[Row]:
    return [
        base
        | {
            "kernel": entry.contender.name,
            "backend": entry.contender.backend,
            "mode": entry.contender.mode,
            "charge": charge,
        }
        | entry.columns
        for entry in entries
        for charge in entry.charges
    ]


def case_columns(case: Case) -> Row:
    """The columns that identify the case of a row."""
    return {
        "case": case_id(case),
        "op": case.op,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "density": case.density,
        "dtype": dtype_name(case.dtype),
        "mask": case.mask,
        "seed": case.seed,
        "dropout": case.dropout if isinstance(case, LayerCase) else None,
    }


def _each(charges: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [(charge,) for charge in charges]
