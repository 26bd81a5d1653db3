"""One case of a layer: check every contender, weigh it, time those that are right."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.layer.case import FWD_BWD, STEP_FUSED, Adapted, LayerCase, LayerProblem
from bench.layer.check import Check
from bench.layer.contenders import LayerContender, contenders
from bench.layer.memory import Weigher
from bench.measuring import clocks, timing
from bench.measuring.results import Row

# The step that is checked moves every parameter by about this much, as the weights themselves are
# of this size: a weight that was not written anew is seen. Those that are timed hardly move.
_CHECKED_LR, _TIMED_LR = 1e-2, 1e-7
Weigh = Callable[[LayerCase, str, str, str, int], Row]


class Step:
    """What is timed: forward and backward, and AdamW if the mode has it."""

    def __init__(self, problem: LayerProblem, adapted: Adapted, mode: str) -> None:
        self._problem, self._module = problem, adapted.module
        self._parameters, self._leaf = adapted.parameters, problem.leaf()
        self.optimizer: torch.optim.Optimizer | None = None
        self._handle: object = None
        if self._parameters:
            fused = True if mode == STEP_FUSED else None
            self.optimizer = torch.optim.AdamW(self._parameters, lr=_TIMED_LR, fused=fused)
            self._handle = adapted.attach(self.optimizer)
        self._stepped = self.optimizer if mode != FWD_BWD else None

    def __call__(self) -> None:
        # Gradients of the last call go first, in every mode: who trains holds one set of them.
        self.clear()
        self._problem.run(self._module, self._leaf).backward(self._problem.dy)
        if self._stepped is not None:
            self._stepped.step()

    def clear(self) -> None:
        """Let go of the gradients."""
        self._leaf.grad = None
        for parameter in self._parameters:
            parameter.grad = None

    def once_far(self) -> None:
        """One call whose step moves the parameters visibly."""
        assert self._stepped is not None
        for group in self._stepped.param_groups:
            group["lr"] = _CHECKED_LR
        self()
        for group in self._stepped.param_groups:
            group["lr"] = _TIMED_LR


def step_of(problem: LayerProblem, adapted: Adapted, mode: str) -> Step:
    """The call of a mode."""
    return Step(problem, adapted, mode)


def contender_of(case: LayerCase, name: str, mode: str, device: str) -> LayerContender:
    """The contender of that name and mode."""
    (found,) = (c for c in contenders(case, device) if (c.name, c.mode) == (name, mode))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices of torch about sparse tensors and of PEFT about its configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class _Entry:
    contender: LayerContender
    columns: Row = field(default_factory=dict)
    call: Step | None = None
    estimate: float = 0.0


def run_case(
    case: LayerCase,
    competing: Sequence[LayerContender],
    rule: timing.Rule,
    device: str,
    failure: Callable[[Exception], Row],
    weigh: Weigh | None = None,
    timer: str = clocks.COLD,
) -> list[Row]:
    """The columns of all contenders of a case beyond the case's own, in the order given.

    A contender is checked before its step and after it, then weighed, then timed in turns with the
    others. `failure` makes the columns of an exception.
    """
    entries = [_Entry(contender) for contender in competing]
    with quiet():
        try:
            problem = LayerProblem(case, device)
            check = Check(problem)
        except Exception as error:  # the reason goes into every row of the case
            return [_columns(entry, failure(error)) for entry in entries]
        for entry in entries:
            _examine(entry, problem, check, failure, weigh or Weigher())
        calls = {str(i): e.call for i, e in enumerate(entries) if e.call is not None}
        estimates = {str(i): e.estimate for i, e in enumerate(entries)}
        try:
            timed = timing.interleaved(calls, rule, clocks.clock_on(device, timer), estimates)
        except Exception as error:  # one that passed once and then fails takes all down
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
    weigh: Weigh,
) -> None:
    """Build, check and weigh a contender; leaves a call only if it may be timed."""
    contender, case = entry.contender, problem.case
    reason = contender.reject(problem)
    if reason is not None:
        entry.columns = {"status": "unsupported", "reason": reason}
        return
    try:
        forms = contender.forms(problem)
        entry.columns = size_columns(contender, problem)
        adapted = contender.build(problem, forms)
        call = step_of(problem, adapted, contender.mode)
        worst = check(adapted, forms)
        if contender.mode != FWD_BWD:
            call.once_far()
            now = {name: form.now(adapted.trained[name]) for name, form in forms.items()}
            worst = max(worst, check(adapted, now))
        entry.columns["max_err"] = worst
        entry.columns |= weigh(
            case, contender.name, contender.mode, problem.device, torch.get_num_threads()
        )
        start = time.perf_counter()
        call()
        entry.estimate = time.perf_counter() - start
        entry.call = call
    except AssertionError as error:
        entry.columns |= {"status": "incorrect", "reason": str(error)}
    except Exception as error:  # a peer may raise anything; the row says what
        entry.columns |= failure(error)


def size_columns(contender: LayerContender, problem: LayerProblem) -> Row:
    """What trains, and the products that forward and backward need at least."""
    tokens, trainable, nnz, flops = problem.case.k, 0, 0, 0
    forms = contender.forms(problem)
    for name, form in forms.items():
        m, n = problem.specs[name].weight.shape
        trainable += form.trainable((m, n))
        nnz += form.nnz
        flops += (6 if "weight" in form.trains else 4) * tokens * m * n
        if form.selector is not None:
            flops += 6 * tokens * form.rank * m
        elif form.rank:
            flops += 6 * tokens * form.rank * (m + n)
        flops += 2 * tokens * form.nnz
    ranks = {form.rank for form in forms.values()}
    rank = ranks.pop() if len(ranks) == 1 else None
    return {"nnz": nnz, "rank": rank, "trainable": trainable, "flops": flops}


def _columns(entry: _Entry, more: dict[str, Any]) -> Row:
    return entry.columns | more
