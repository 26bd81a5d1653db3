"""Dense GEMM, and dense GEMM + gather: what the sparse op is worth at all.

GEMM reads and writes both stride orders at full rate, so it pays no conversion.
"""

from __future__ import annotations

from bench.contender import Contender, Problem, Run


def _spmm(problem: Problem, charge: str) -> Run:
    weight, x = problem.dense, problem.inputs["b"].t()
    return lambda: (x @ weight.t()).t()


def _sddmm(problem: Problem, charge: str) -> Run:
    dy, x, flat = problem.inputs["a"].t(), problem.inputs["b"].t(), problem.flat
    return lambda: (dy.t() @ x).view(-1).index_select(0, flat)


CONTENDERS = (
    Contender("spmm", "dense", "torch", _spmm, token_major=True),
    Contender("sddmm", "dense", "torch", _sddmm, token_major=True),
)
