"""sddmm: a dense product sampled at a sparsity pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops import _dispatch, _library, _validate
from rosa_kernels.ops.csr_transpose import or_transpose
from rosa_kernels.pattern import CsrPattern


def sddmm(
    pattern: CsrPattern,
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled dense-dense matrix product: A B^T at the pattern's entries only.

    Formula: values[t] = sum over l of a[i_t, l] * b[j_t, l], accumulated in float32 (float64 for
    float64). The gradient of a sparse weight is dS = sddmm(pattern, dy.T, x.T).

    Shapes: pattern (m, n) with nnz entries; a (m, k), b (n, k), any strides -> values (nnz,).
    Token-major dy (T, m) and x (T, n) are passed as ``dy.T`` and ``x.T`` and are read in place.
    Dtypes: a and b have one dtype: float32, bfloat16, float16 or float64. out_dtype is that dtype
    (default) or, for 16-bit operands, float32, which keeps a float16 gradient from overflowing.
    Under autocast, a and b are cast to the autocast dtype.
    Backward: grad_a = spmm(pattern, grad, b); grad_b = spmm(pattern.T, grad_T, a).
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    Source: Nikdan et al., RoSA, arXiv 2401.04679; Gale et al., arXiv 2006.10901.
    """
    _validate.check_pattern("sddmm", pattern)
    _validate.check_matrix("sddmm", "a", a, pattern)
    _validate.check_matrix("sddmm", "b", b, pattern)
    m, n = pattern.shape
    _validate.check_size("sddmm", "a", a, 0, m, "m={} rows like the pattern")
    _validate.check_size("sddmm", "b", b, 0, n, "n={} rows like the pattern's columns")
    _validate.check_size("sddmm", "b", b, 1, a.shape[1], "k={} columns like a")
    a, b = _validate.autocast(a, b)
    _validate.check_same_dtype("sddmm", a, b)
    if out_dtype is None:
        out_dtype = a.dtype
    else:
        _validate.check_values_dtype("sddmm", "out_dtype", out_dtype, a.dtype)
    backend = registry.requested(backend)
    differentiate = _library.must_differentiate(a, b)
    return _library.call(
        sddmm_op,
        differentiate,
        pattern.crow_indices,
        pattern.col_indices,
        _dispatch.backward_tensors(pattern, backend) if differentiate and b.requires_grad else [],
        _dispatch.plan_tensors("sddmm", pattern, backend),
        a,
        b,
        out_dtype,
        backend,
    )


def _run(
    crow: Tensor,
    col: Tensor,
    transpose: list[Tensor],
    plan: list[Tensor],
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    indices = crow, col
    return _dispatch.run_product(
        "sddmm", indices, (a, b), out_dtype, plan, backend, a, b, out_dtype
    )


def _fake(
    crow: Tensor,
    col: Tensor,
    transpose: list[Tensor],
    plan: list[Tensor],
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return a.new_empty(col.shape[0], dtype=out_dtype)


class _Sddmm(_library.AutogradFunction):
    @staticmethod
    def forward(
        ctx: Any,
        crow: Tensor,
        col: Tensor,
        transpose: list[Tensor],
        plan: list[Tensor],
        *args: Any,
    ) -> Tensor:
        a, b, ctx.out_dtype, ctx.backend = args
        ctx.save_for_backward(crow, col, a, b, *plan, *transpose)
        ctx.save_for_forward(crow, col, a, b, *plan)
        ctx.set_materialize_grads(False)
        ctx.plan_size = len(plan)
        return _library.below_autograd(sddmm_op, crow, col, transpose, plan, *args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        crow, col, a, b, *plan = ctx.saved_tensors
        *_, a_t, b_t, _, _ = tangents
        pairs = [(a_t, b)] if b_t is None else [(a, b_t)] if a_t is None else [(a_t, b), (a, b_t)]
        return sum(
            sddmm_op(crow, col, [], plan, x, y, ctx.out_dtype, ctx.backend) for x, y in pairs
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        crow, col, a, b, *rest = ctx.saved_tensors
        plan, transpose = rest[: ctx.plan_size], rest[ctx.plan_size :]
        backend = registry.backend_for_gradient("spmm", ctx.backend)
        grad_a = grad_b = None
        if ctx.needs_input_grad[4]:
            grad_a = _library.OPS["spmm"](crow, col, transpose, plan, grad, b, backend)
        if ctx.needs_input_grad[5]:
            crow_t, col_t, permutation, plan_t = or_transpose(crow, col, b.shape[0], transpose)
            grad_t = grad.index_select(0, permutation)
            grad_b = _library.OPS["spmm"](crow_t, col_t, [], plan_t, grad_t, a, backend)
        return None, None, None, None, grad_a, grad_b, None, None


sddmm_op = _library.define(
    "sddmm(Tensor crow_indices, Tensor col_indices, Tensor[] transpose, Tensor[] plan, Tensor a, "
    "Tensor b, ScalarType out_dtype, str backend) -> Tensor",
    _run,
    _fake,
    _Sddmm,
    differentiable=(4, 5),
)
