"""The scratch memory that our kernels say they allocate besides their result."""

from __future__ import annotations

from itertools import pairwise

import torch

import rosa_kernels as rk
from rosa_kernels.backends import native, native_cuda
from rosa_kernels.backends.slabs import SLAB_BYTES, slab_edges
from rosa_kernels.tile_plan import SLABS

from .base import Problem

_IN_PLACE = ("csr_add_", "csr_gather", "csr_scatter_")


def workspace_bytes(problem: Problem, kernel: rk.Kernel) -> int | None:
    """Bytes of scratch of a call, as the kernel states them, or None if it states none."""
    if kernel.backend in ("cpu", "cuda") and kernel.op in _IN_PLACE:
        return 0
    if kernel.backend == "dense":
        return _slab_bytes(problem)
    if kernel.backend not in ("cpu", "cuda") or kernel.variant is None:
        return None
    pattern, case = problem.pattern, problem.case
    crow, col = pattern.crow_indices, pattern.col_indices
    if kernel.backend == "cuda":
        operands = [problem.inputs[name] for name in ("a", "b") if name in problem.inputs]
        plan = pattern.tile_plan.tensors
        return native_cuda.cuda_workspace_bytes(case.op, kernel.variant, crow, col, operands, plan)
    csr = native.csr_of(crow, col, case.n)
    threads = torch.get_num_threads()
    return native.workspace_bytes(case.op, kernel.variant, csr, case.k, case.dtype, threads)


def _slab_bytes(problem: Problem) -> int | None:
    """The largest slab of the dense kernels; on a CPU also the converted 16-bit operands."""
    case = problem.case
    width = case.dtype.itemsize
    wide = max(width, 4)
    operand = width if problem.device == "cuda" else wide
    row_bytes = case.n * (wide if case.op == "sddmm" else operand)
    edges = slab_edges(case.m, row_bytes)
    if edges is None:
        return None
    tallest = max(case.m * b // SLABS - case.m * a // SLABS for a, b in pairwise(edges))
    rows = case.m + case.n if case.op == "sddmm" else case.n
    converted = 0 if operand == width else rows * case.k * operand
    product = 0 if case.op == "sddmm" else min(tallest * case.k * wide, SLAB_BYTES)
    return tallest * row_bytes + product + converted
