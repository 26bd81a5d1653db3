"""csr_transpose: the transpose of a sparse matrix, without a dense matrix in between."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels import choice
from rosa_kernels.kernel import Call
from rosa_kernels.ops import _library, _validate
from rosa_kernels.pattern import CsrPattern


def csr_transpose(pattern: CsrPattern, values: Tensor) -> tuple[CsrPattern, Tensor]:
    """The transpose of the sparse matrix (pattern, values).

    Formula: S^T[j_t, i_t] = values[t]. The pattern is transposed once and cached as ``pattern.T``;
    a call only permutes the values.

    Shapes: pattern (m, n); values (nnz,) -> pattern (n, m); values (nnz,).
    Backward: the gradient's values are permuted back.
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape; RuntimeError for a
    wrong device or a changed pattern.
    """
    _validate.check_pattern("csr_transpose", pattern)
    _validate.check_values("csr_transpose", values, pattern)
    return pattern.T, values.index_select(0, pattern.transpose_permutation)


def transpose_tensors(pattern: CsrPattern) -> list[Tensor]:
    """The crow, col and permutation of the transpose, which an op's backward needs."""
    t = pattern.T
    return [t.crow_indices, t.col_indices, pattern.transpose_permutation]


def or_transpose(
    crow: Tensor, col: Tensor, n: int, transpose: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The crow, col, permutation and tile plan of the transpose, from `transpose`.

    If `transpose` is empty, as in double backward, they are computed, and the plan is [].
    """
    crow_t, col_t, permutation, *plan = transpose or csr_transpose_op(crow, col, n)
    return crow_t, col_t, permutation, plan


def _run(crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(col.device.type, torch.int32, (crow.numel() - 1, n))
    return choice.select("csr_transpose", call).run(crow, col, n)


def _fake(crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return crow.new_empty(n + 1), torch.empty_like(col), torch.empty_like(col)


csr_transpose_op = _library.define(
    "csr_transpose(Tensor crow_indices, Tensor col_indices, SymInt n) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
