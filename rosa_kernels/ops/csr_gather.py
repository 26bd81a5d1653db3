"""csr_gather: the entries of a dense matrix at a sparsity pattern."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops import _dispatch, _library, _validate
from rosa_kernels.pattern import CsrPattern


def csr_gather(w: Tensor, pattern: CsrPattern, *, backend: str | None = None) -> Tensor:
    """The entries of a dense matrix at the pattern.

    Formula: values[t] = w[i_t, j_t].

    Shapes: w (m, n), any strides; pattern (m, n) -> values (nnz,), in w's dtype.
    Backward: grad_w is zero except at the pattern, where it is grad_values.
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    """
    _validate.check_pattern("csr_gather", pattern)
    _validate.check_matrix("csr_gather", "w", w, pattern)
    _validate.check_shape_of_pattern("csr_gather", "w", w, pattern)
    return _library.call(
        csr_gather_op,
        _library.must_differentiate(w),
        w,
        pattern.crow_indices,
        pattern.col_indices,
        registry.requested(backend),
    )


def _run(w: Tensor, crow: Tensor, col: Tensor, backend: str) -> Tensor:
    return _dispatch.run_on_matrix("csr_gather", w, backend, crow, col)


def _fake(w: Tensor, crow: Tensor, col: Tensor, backend: str) -> Tensor:
    return w.new_empty(col.shape[0])


class _CsrGather(_library.AutogradFunction):
    @staticmethod
    def forward(ctx: Any, w: Tensor, crow: Tensor, col: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(crow, col)
        ctx.save_for_forward(crow, col)
        ctx.shape, ctx.backend = w.shape, backend
        return _library.below_autograd(csr_gather_op, w, crow, col, backend)

    @staticmethod
    def jvp(ctx: Any, w_t: Tensor, *_: None) -> Tensor:
        crow, col = ctx.saved_tensors
        return csr_gather_op(w_t, crow, col, ctx.backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        crow, col = ctx.saved_tensors
        zero = grad.new_zeros(ctx.shape)
        return _library.OPS["csr_add"](zero, crow, col, grad, 1.0, ctx.backend), None, None, None


csr_gather_op = _library.define(
    "csr_gather(Tensor w, Tensor crow_indices, Tensor col_indices, str backend) -> Tensor",
    _run,
    _fake,
    _CsrGather,
    differentiable=(0,),
)
