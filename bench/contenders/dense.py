"""Dense GEMM, and dense GEMM + gather: what the sparse op is worth at all.

GEMM reads and writes both stride orders at full rate, so it pays no conversion.

On CUDA torch allows cuBLAS to add partial sums in 16 bits unless told otherwise. "dense" is told
otherwise, which is what this project's accuracy asks of everybody; "dense-reduced" has torch's
default, and a time where its result still passes the check.
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
    """Set torch's two switches round every call; the CPU has no such sums."""
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
        return f"reduced sums are for float16 and bfloat16, got {problem.case.dtype}"
    return None


def _serves(problem: Problem) -> str:
    """The result's dtype decides how much is written: it goes into the rows."""
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
