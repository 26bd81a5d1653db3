"""Sputnik-style products: our re-implementation of a published idea, which no op uses.

Gale et al., "Sparse GPU Kernels for Deep Learning", arXiv 2006.10901: one-dimensional tiles,
sub-warps, rows ordered by nnz. The grid of the published SDDMM covers the whole dense matrix; at
0.1 % density 99 % of it does no work. The grid of "-trimmed" covers the nonempty rows, at the
length of the longest one, as in spops. It computes these sizes once, where spops does so at every
call. Unlike the original, both read 16-bit operands directly, at half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rosa_kernels.backends import native
from rosa_kernels.backends.native import csr_of, matrix_of, vector_of

from ..measuring.names import OP
from .base import Contender, Problem, Run, token_major

_CUDA = frozenset({"cuda"})
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reject(problem: Problem) -> str | None:
    if not hasattr(native._C, f"cuda_sputnik_style_{problem.case.op}"):
        return "rosa_kernels._C was built without the Sputnik-style kernels"
    if problem.case.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.case.dtype}"
    return None


def _where(x: Tensor) -> tuple[int, int]:
    index = x.get_device()
    if index < 0:  # emulated, in tests
        return 0, 0
    return index, torch.cuda.current_stream(index).cuda_stream


def _sddmm(trimmed: bool) -> Callable[[Problem, str], Run]:
    def prepare(problem: Problem, charge: str) -> Run:
        kernel, pattern = native._C.cuda_sputnik_style_sddmm, problem.pattern
        csr = csr_of(pattern.crow_indices, pattern.col_indices, problem.case.n)
        swizzle, x = pattern.row_swizzle, problem.operands(charge)
        grid = (problem.case.m, problem.case.n)
        if trimmed:
            lengths = pattern.row_nnz
            grid = (int((lengths > 0).sum()), int(lengths.max()) if problem.case.m else 0)

        def run() -> Tensor:
            a, b = x["a"].contiguous(), x["b"].contiguous()
            out = a.new_empty(pattern.nnz)
            operands = (matrix_of(a), matrix_of(b), vector_of(out, pattern.nnz))
            kernel(csr, swizzle.data_ptr(), *grid, *operands, *_where(out))
            return out

        return run

    return prepare


def _spmm(problem: Problem, charge: str) -> Run:
    kernel, pattern = native._C.cuda_sputnik_style_spmm, problem.pattern
    csr = csr_of(pattern.crow_indices, pattern.col_indices, problem.case.n)
    swizzle, values = pattern.row_swizzle, problem.inputs["values"]
    b = problem.operands(charge)["b"]

    def run() -> Tensor:
        rows = b.contiguous()
        c = rows.new_empty(problem.case.m, problem.case.k)
        operands = (vector_of(values, pattern.nnz), matrix_of(rows), matrix_of(c))
        kernel(csr, swizzle.data_ptr(), *operands, *_where(c))
        return c if charge == OP else token_major(c)

    return run


CONTENDERS = (
    Contender("spmm", "sputnik_style", "sputnik_style", _spmm, _reject, _CUDA),
    Contender("sddmm", "sputnik_style", "sputnik_style", _sddmm(False), _reject, _CUDA),
    Contender("sddmm", "sputnik_style-trimmed", "sputnik_style", _sddmm(True), _reject, _CUDA),
)
