"""csr_scatter_: write values into a dense matrix at a sparsity pattern, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops import _dispatch, _library, _validate
from rosa_kernels.pattern import CsrPattern


def csr_scatter_(
    w: Tensor, pattern: CsrPattern, values: Tensor, *, backend: str | None = None
) -> Tensor:
    """Write values into w at the pattern, in place; returns w.

    Formula: w[i_t, j_t] = values[t]. The other elements of w do not change. Values of w's dtype are
    copied bit by bit. So this op restores exactly what csr_gather read before csr_add_ changed w;
    adding the negated values would not.

    Shapes: w (m, n), any strides without internal overlap; pattern (m, n); values (nnz,), of w's
    dtype, or float32, which is rounded.
    This op has no autograd, because torch does not allow that for an op that mutates its input.
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    RuntimeError also if elements of w share memory, with each other or with values, if w requires
    grad, or if values requires grad while grad mode is on.
    """
    _validate.check_pattern("csr_scatter_", pattern)
    _validate.check_matrix("csr_scatter_", "w", w, pattern)
    _validate.check_shape_of_pattern("csr_scatter_", "w", w, pattern)
    _validate.check_values("csr_scatter_", values, pattern, w.dtype)
    _validate.check_target("csr_scatter_", w, values, "pass detached tensors")
    _validate.check_not_inference("csr_scatter_", w)
    _library.call(
        csr_scatter__op,
        _library.is_transforming(),
        w,
        pattern.crow_indices,
        pattern.col_indices,
        values,
        registry.requested(backend),
    )
    return w


def _run(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, backend: str) -> None:
    _dispatch.run_in_place("csr_scatter_", w, backend, crow, col, values)
    torch.autograd.graph.increment_version(w)


def _fake(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, backend: str) -> None:
    return None


csr_scatter__op = _library.define(
    "csr_scatter_(Tensor(a!) w, Tensor crow_indices, Tensor col_indices, Tensor values, "
    "str backend) -> ()",
    _run,
    _fake,
)
