"""spmm: the product of a sparse and a dense matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops import _dispatch, _library, _validate
from rosa_kernels.ops.csr_transpose import or_transpose
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.strides import empty_like_order


def spmm(pattern: CsrPattern, values: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Sparse-dense matrix product C = S B.

    Formula: c[i, l] = sum over entries t of row i of values[t] * b[j_t, l], accumulated in float32
    (float64 for float64).

    Shapes: pattern (m, n) with nnz entries; values (nnz,); b (n, k), any strides -> c (m, k), in
    the stride order of b. For token-major x (T, n), pass ``x.T``; the result is y.T, with y (T, m)
    token-major.
    Dtypes: b float32, bfloat16, float16 or float64; values of b's dtype or float32.
    Under autocast, b is cast to the autocast dtype; values are not cast.
    Backward: grad_values = sddmm(pattern, grad_c, b); grad_b = spmm(pattern.T, values_T, grad_c).
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    Source: Gale et al., Sparse GPU Kernels for Deep Learning, arXiv 2006.10901.
    """
    _validate.check_pattern("spmm", pattern)
    _validate.check_matrix("spmm", "b", b, pattern)
    n = pattern.shape[1]
    _validate.check_size("spmm", "b", b, 0, n, "n={} rows like the pattern's columns")
    (b,) = _validate.autocast(b)
    _validate.check_values("spmm", values, pattern, b.dtype)
    backend = registry.requested(backend)
    differentiate = _library.must_differentiate(values, b)
    return _library.call(
        spmm_op,
        differentiate,
        pattern.crow_indices,
        pattern.col_indices,
        _dispatch.backward_tensors(pattern, backend) if differentiate and b.requires_grad else [],
        _dispatch.plan_tensors("spmm", pattern, backend),
        values,
        b,
        backend,
    )


def _run(
    crow: Tensor,
    col: Tensor,
    transpose: list[Tensor],
    plan: list[Tensor],
    values: Tensor,
    b: Tensor,
    backend: str,
) -> Tensor:
    indices = crow, col
    return _dispatch.run_product("spmm", indices, (b,), values.dtype, plan, backend, values, b)


def _fake(
    crow: Tensor,
    col: Tensor,
    transpose: list[Tensor],
    plan: list[Tensor],
    values: Tensor,
    b: Tensor,
    backend: str,
) -> Tensor:
    return empty_like_order(b, crow.shape[0] - 1)


class _Spmm(_library.AutogradFunction):
    @staticmethod
    def forward(
        ctx: Any,
        crow: Tensor,
        col: Tensor,
        transpose: list[Tensor],
        plan: list[Tensor],
        *args: Any,
    ) -> Tensor:
        values, b, ctx.backend = args
        ctx.save_for_backward(crow, col, values, b, *plan, *transpose)
        ctx.save_for_forward(crow, col, values, b, *plan)
        ctx.set_materialize_grads(False)
        ctx.plan_size = len(plan)
        return _library.below_autograd(spmm_op, crow, col, transpose, plan, *args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        crow, col, values, b, *plan = ctx.saved_tensors
        *_, v_t, b_t, _ = tangents
        pairs = [(values, b_t)] if v_t is None else [(v_t, b)]
        if v_t is not None and b_t is not None:
            pairs.append((values, b_t))
        return sum(spmm_op(crow, col, [], plan, v, x, ctx.backend) for v, x in pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        crow, col, values, b, *rest = ctx.saved_tensors
        plan, transpose = rest[: ctx.plan_size], rest[ctx.plan_size :]
        grad_values = grad_b = None
        if ctx.needs_input_grad[4]:
            backend = registry.backend_for_gradient("sddmm", ctx.backend)
            grad_values = _library.OPS["sddmm"](
                crow, col, transpose, plan, grad, b, values.dtype, backend
            )
        if ctx.needs_input_grad[5]:
            crow_t, col_t, permutation, plan_t = or_transpose(crow, col, b.shape[0], transpose)
            values_t = values.index_select(0, permutation)
            backend = registry.backend_for_gradient("spmm", ctx.backend)
            grad_b = spmm_op(crow_t, col_t, [], plan_t, values_t, grad, backend)
        return None, None, None, None, grad_values, grad_b, None


spmm_op = _library.define(
    "spmm(Tensor crow_indices, Tensor col_indices, Tensor[] transpose, Tensor[] plan, "
    "Tensor values, Tensor b, str backend) -> Tensor",
    _run,
    _fake,
    _Spmm,
    differentiable=(4, 5),
)
