"""csr_add: add a sparse matrix to a dense one, into a new matrix or in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops import _dispatch, _library, _validate
from rosa_kernels.pattern import CsrPattern


def csr_add(
    w: Tensor,
    pattern: CsrPattern,
    values: Tensor,
    alpha: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """w + alpha * S, as a new dense matrix.

    Formula: out = w, except out[i_t, j_t] = w[i_t, j_t] + alpha * values[t].

    The native kernels compute an element in float64 and round it to w's dtype. A 16-bit element is
    rounded to float32 first. The reference computes in float32, or in float64 for a float64 w.

    Shapes: w (m, n); pattern (m, n); values (nnz,), of w's dtype or float32 -> (m, n), w's dtype.
    Backward: grad_w = grad; grad_values = alpha * csr_gather(grad, pattern).
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    """
    _check("csr_add", w, pattern, values)
    return _library.call(
        csr_add_op,
        _library.must_differentiate(w, values),
        w,
        pattern.crow_indices,
        pattern.col_indices,
        values,
        float(alpha),
        registry.requested(backend),
    )


def csr_add_(
    w: Tensor,
    pattern: CsrPattern,
    values: Tensor,
    alpha: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """w += alpha * S, in place; returns w.

    This op touches nnz elements and allocates nothing. It has no autograd, because torch does not
    allow that for an op that mutates its input. :func:`csr_add` is differentiable.

    Shapes and dtypes: as for :func:`csr_add`. w may have any strides without internal overlap.
    Raises: what :func:`csr_add` raises; RuntimeError if elements of w share memory, with each
    other or with values, if w requires grad, or if values requires grad while grad mode is on.
    """
    _check("csr_add_", w, pattern, values)
    _validate.check_target("csr_add_", w, values, "use csr_add")
    _validate.check_not_inference("csr_add_", w)
    _library.call(
        csr_add__op,
        _library.is_transforming(),
        w,
        pattern.crow_indices,
        pattern.col_indices,
        values,
        float(alpha),
        registry.requested(backend),
    )
    return w


def _check(op: str, w: Tensor, pattern: CsrPattern, values: Tensor) -> None:
    _validate.check_pattern(op, pattern)
    _validate.check_matrix(op, "w", w, pattern)
    _validate.check_shape_of_pattern(op, "w", w, pattern)
    _validate.check_values(op, values, pattern, w.dtype)


def _run_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float, backend: str) -> None:
    _dispatch.run_in_place("csr_add_", w, backend, crow, col, values, alpha)
    torch.autograd.graph.increment_version(w)


def _fake_(
    w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float, backend: str
) -> None:
    return None


def _run(
    w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float, backend: str
) -> Tensor:
    out = w.clone(memory_format=torch.preserve_format)
    _run_(out, crow, col, values, alpha, backend)
    return out


def _fake(
    w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float, backend: str
) -> Tensor:
    return torch.empty_like(w)


class _CsrAdd(_library.AutogradFunction):
    @staticmethod
    def forward(ctx: Any, w: Tensor, crow: Tensor, col: Tensor, *args: Any) -> Tensor:
        values, ctx.alpha, ctx.backend = args
        ctx.save_for_backward(crow, col)
        ctx.save_for_forward(crow, col)
        ctx.values_dtype = values.dtype
        return _library.below_autograd(csr_add_op, w, crow, col, *args)

    @staticmethod
    def jvp(ctx: Any, w_t: Tensor, _crow: None, _col: None, v_t: Tensor, *_: None) -> Tensor:
        crow, col = ctx.saved_tensors
        return csr_add_op(w_t, crow, col, v_t, ctx.alpha, ctx.backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        crow, col = ctx.saved_tensors
        grad_values = None
        if ctx.needs_input_grad[3]:
            gathered = _library.OPS["csr_gather"](grad, crow, col, ctx.backend)
            grad_values = gathered.to(ctx.values_dtype) * ctx.alpha
        grad_w = grad if ctx.needs_input_grad[0] else None
        return grad_w, None, None, grad_values, None, None


csr_add_op = _library.define(
    "csr_add(Tensor w, Tensor crow_indices, Tensor col_indices, Tensor values, float alpha, "
    "str backend) -> Tensor",
    _run,
    _fake,
    _CsrAdd,
    differentiable=(0, 3),
)

csr_add__op = _library.define(
    "csr_add_(Tensor(a!) w, Tensor crow_indices, Tensor col_indices, Tensor values, float alpha, "
    "str backend) -> ()",
    _run_,
    _fake_,
)
