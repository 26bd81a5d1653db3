"""The least arithmetic and memory traffic of a case, in any implementation."""

from __future__ import annotations

from ..contenders.base import Contender, Problem
from ..measuring.results import Row

_INDEX = 4  # bytes of an int32


def size_columns(problem: Problem, contender: Contender) -> Row:
    """flops, bytes and output_bytes of the case, and workspace_bytes of the contender.

    flops counts the products of the entries, also for a contender that computes the whole dense
    matrix. bytes counts every input read once and every output written once. output_bytes is the
    least that any implementation must allocate.
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
