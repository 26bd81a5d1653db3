"""Arithmetic and memory that a case needs at least, whoever computes it."""

from __future__ import annotations

from ..contenders.base import Contender, Problem
from ..measuring.results import Row

_INDEX = 4  # bytes of an int32


def size_columns(problem: Problem, contender: Contender) -> Row:
    """flops, bytes and output_bytes of the case; workspace_bytes of the contender.

    flops counts what the entries need, also for a contender that computes all of the dense matrix.
    bytes reads every input once and writes every output once. output_bytes is the least that any
    implementation must allocate.
    """
    case, nnz = problem.case, problem.pattern.nnz
    size = case.dtype.itemsize
    index = nnz * _INDEX + (case.m + 1) * _INDEX
    products = 2 * nnz * case.k
    dense = (case.m + case.n) * case.k * size
    flops, traffic, output = {
        "sddmm": (products, dense + index + nnz * size, nnz * size),
        "spmm": (products, dense + index + nnz * size, case.m * case.k * size),
        "csr_add_": (2 * nnz, index + 3 * nnz * size, 0),
        "csr_scatter_": (0, index + 2 * nnz * size, 0),
        "csr_gather": (0, index + 2 * nnz * size, nnz * size),
    }[case.op]
    return {
        "flops": flops,
        "bytes": traffic,
        "output_bytes": output,
        "workspace_bytes": contender.workspace(problem),
    }
