"""torch's own sparse ops: CSR and CSC products, sampled_addmm, addition; and its scatters.

On CUDA the products go through cuSPARSE. The layouts were chosen by measurement, in float32 at 4096
x 4096 with 2048 tokens on 2 cores:

- ``S @ b`` on contiguous rows takes 60 ms at 1 % and 158 at 5 %; with both conversions 96 and 176.
  On a transposed view it takes 75 and 250, without the conversion of the result.
- ``x @ S.t()`` (CSC) needs no conversion, but takes 54 ms at 0.1 %, 114 at 1 % and 851 at 5 %. It
  is a contender of its own.
- ``sampled_addmm`` is fastest with contiguous rows of both operands and b passed as the transposed
  view: 56 ms at 1 %. It takes 97 ms on token-major operands, and 104 if they are converted first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..measuring.names import OP
from .base import Contender, Problem, Run, token_major

_DTYPES = (torch.float32, torch.float64)


def _reject(problem: Problem) -> str | None:
    if problem.device == "cpu" and problem.case.dtype not in _DTYPES:
        return f"torch's CPU sparse products take float32 and float64, got {problem.case.dtype}"
    return None


def _reject_sampled(problem: Problem) -> str | None:
    if problem.case.dtype not in _DTYPES:
        return f"sampled_addmm takes float32 and float64, got {problem.case.dtype}"
    return None


def _csr_mm(problem: Problem, charge: str) -> Run:
    s, b = problem.sparse_csr, problem.operands(charge)["b"]
    if charge == OP:
        return lambda: s @ b
    return lambda: token_major(s @ b.contiguous())


def _csc_mm(problem: Problem, charge: str) -> Run:
    st, x = problem.sparse_csr.t(), problem.inputs["b"].t()
    return lambda: (x @ st).t()


def _sampled_addmm(problem: Problem, charge: str) -> Run:
    s, x = problem.sparse_csr, problem.operands(charge)
    a, b_t = x["a"], x["b"].t()
    return lambda: torch.sparse.sampled_addmm(s, a, b_t, beta=0.0).values()


def _add_(problem: Problem, charge: str) -> Run:
    s, w = problem.sparse_csr, problem.inputs["w"].clone()
    return lambda: w.add_(s)


def _scatter_add_(problem: Problem, charge: str) -> Run:
    w, flat, values = problem.inputs["w"].clone(), problem.flat, problem.inputs["values"]
    target = w.view(-1)

    def run() -> torch.Tensor:
        target.scatter_add_(0, flat, values)
        return w

    return run


def _index_put_(accumulate: bool) -> Callable[[Problem, str], Run]:
    def prepare(problem: Problem, charge: str) -> Run:
        w, values = problem.inputs["w"].clone(), problem.inputs["values"]
        at = (problem.pattern.row_indices.long(), problem.pattern.col_indices.long())
        return lambda: w.index_put_(at, values, accumulate=accumulate)

    return prepare


def _scatter_(problem: Problem, charge: str) -> Run:
    w, flat, values = problem.inputs["w"].clone(), problem.flat, problem.inputs["values"]
    target = w.view(-1)

    def run() -> torch.Tensor:
        target.scatter_(0, flat, values)
        return w

    return run


def _index_select(problem: Problem, charge: str) -> Run:
    w, flat = problem.inputs["w"].view(-1), problem.flat
    return lambda: w.index_select(0, flat)


CONTENDERS = (
    Contender("spmm", "torch-csr", "torch", _csr_mm, _reject),
    Contender("spmm", "torch-csc", "torch", _csc_mm, _reject, token_major=True),
    Contender("sddmm", "torch-sampled", "torch", _sampled_addmm, _reject_sampled),
    Contender("csr_add_", "torch-csr", "torch", _add_, charges=(OP,)),
    Contender("csr_add_", "torch-scatter", "torch", _scatter_add_, charges=(OP,)),
    Contender("csr_add_", "torch-index", "torch", _index_put_(True), charges=(OP,)),
    Contender("csr_scatter_", "torch-scatter", "torch", _scatter_, charges=(OP,)),
    Contender("csr_scatter_", "torch-index", "torch", _index_put_(False), charges=(OP,)),
    Contender("csr_gather", "torch-index", "torch", _index_select, charges=(OP,)),
)
