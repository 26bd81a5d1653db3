"""The (case, contender) pairs of a suite under pytest-benchmark: ``pytest bench --benchmark-only``.

BENCH_SUITE chooses the suite (default: quick), BENCH_DEVICE the device (default: cpu). As in
``python -m bench run``, each contender is checked before it is timed. Unlike there, every call on a
GPU is timed on the host until the device has finished. The default pytest run does not collect this
folder.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from rosa_kernels.testing import Case

from .contenders.base import Contender, Problem
from .run.check import Check
from .run.runner import quiet_torch
from .suites.cases import case_id, pairs

pytest.importorskip("pytest_benchmark")

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
PAIRS = [
    (case, contender)
    for case, contender in pairs(os.environ.get("BENCH_SUITE", "quick"), device=DEVICE)
    if isinstance(contender, Contender)  # a layer in training needs more than one call
]


@pytest.fixture(scope="module")
def problems() -> dict[str, tuple[Problem, Check]]:
    """The last problem built. The contenders of a case run one after another, so one is enough."""
    return {}


@pytest.mark.parametrize(
    ("case", "contender"), PAIRS, ids=[f"{case_id(case)}-{c.label}" for case, c in PAIRS]
)
def test_pair(
    benchmark: Any, problems: dict[str, tuple[Problem, Check]], case: Case, contender: Contender
) -> None:
    with quiet_torch():
        name = case_id(case)
        if name not in problems:
            problems.clear()
            problem = Problem.of(case, DEVICE)
            problems[name] = problem, Check(problem)
        problem, check = problems[name]
        reason = contender.reject(problem)
        if reason is not None:
            pytest.skip(reason)
        call = contender.prepare(problem, contender.charges[-1])
        check(call())
        benchmark.group = name
        benchmark(call if DEVICE == "cpu" else lambda: (call(), torch.cuda.synchronize()))
