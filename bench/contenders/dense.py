"""Dense GEMM, and dense GEMM + gather: the baseline that a sparse kernel has to beat.

GEMM reads and writes both stride orders at full rate, so it pays no conversion.

By default torch lets cuBLAS add partial sums in 16 bits on CUDA. "dense" forbids that, as this
project's accuracy policy asks of every contender. "dense-reduced" keeps torch's default. It has a
time only if its result still passes the check.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import Contender, Problem, Run

_CUDA = frozenset({"cuda"})
_16_BIT = (torch.bfloat16, torch.float16)


def _spmm(problem: Problem, charge: str) -> Run:
    weight, x = problem.dense, problem.inputs["b"].t()
    return lambda: (x @ weight.t()).t()


def _sddmm(problem: Problem, charge: str) -> Run:
    dy, x, flat = problem.inputs["a"].t(), problem.inputs["b"].t(), problem.flat
    return lambda: (dy.t() @ x).view(-1).index_select(0, flat)


def _with_reduced(
    allowed: bool, prepare: Callable[[Problem, str], Run]
) -> Callable[[Problem, str], Run]:
    """Set torch's two switches around every call. On a CPU there are no such sums."""
    switches = torch.backends.cuda.matmul
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )

    def prepare_with(problem: Problem, charge: str) -> Run:
        call = prepare(problem, charge)
        if problem.device == "cpu":
            return call

        def run() -> torch.Tensor:
            before = [getattr(switches, name) for name in names]
            for name in names:
                setattr(switches, name, allowed)
            try:
                return call()
            finally:
                for name, value in zip(names, before, strict=True):
                    setattr(switches, name, value)

        return run

    return prepare_with


def _reject_reduced(problem: Problem) -> str | None:
    if problem.case.dtype not in _16_BIT:
        return f"only float16 and bfloat16 have reduced sums, got {problem.case.dtype}"
    return None


def _serves(problem: Problem) -> str:
    """The `backend` of a row. It names the result's dtype, which decides how much is written."""
    return f"torch, {str(problem.case.dtype).removeprefix('torch.')} out"


CONTENDERS = tuple(
    contender
    for op, prepare in (("spmm", _spmm), ("sddmm", _sddmm))
    for contender in (
        Contender(
            op, "dense", "torch", _with_reduced(False, prepare), token_major=True, serves=_serves
        ),
        Contender(
            op,
            "dense-reduced",
            "torch",
            _with_reduced(True, prepare),
            _reject_reduced,
            devices=_CUDA,
            token_major=True,
            serves=_serves,
        ),
    )
)
