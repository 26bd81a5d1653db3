"""Shared by the tests that run the benchmark: small cases, a right contender, short runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench.contenders.base import Problem
from bench.measuring import timing
from bench.suites import cpu
from rosa_kernels.testing import Case

# Two samples of each contender, whatever their noise.
FAST = timing.StoppingRule(cap_s=0.001, min_samples=2, max_samples=2)


def small_case(op: str, k: int = 9, dtype: torch.dtype = torch.float32) -> Case:
    """A case of 40 x 24 at density 0.1, for tests that do not depend on the case."""
    return Case(op, 40, 24, k, 0.1, dtype)


def right_sddmm(problem: Problem, charge: str) -> Callable[[], torch.Tensor]:
    """The `prepare` function of an sddmm contender whose results are right."""
    a, b, flat = problem.inputs["a"], problem.inputs["b"], problem.flat
    return lambda: (a @ b.t()).reshape(-1)[flat]


def run_bench(out: Path, *options: str) -> int:
    """`bench run` into `out`, with short samples and without plots. Returns the exit status."""
    return cli.main(["run", "--cap", "0.001", "--no-plots", "--out", str(out), *options])


def replace_suite(monkeypatch: pytest.MonkeyPatch, name: str, *chosen: object) -> None:
    """Makes suite `name` consist of these cases on a CPU."""
    monkeypatch.setattr(cpu, name, lambda seed: [*chosen])
