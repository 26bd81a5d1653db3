"""rosa_linear: a frozen linear map with a sparse and a low-rank branch, as one op each way."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rosa_kernels import choice, registry
from rosa_kernels.kernel import AUTO
from rosa_kernels.ops import _dispatch, _library
from rosa_kernels.ops import _rosa_linear_checks as _checks
from rosa_kernels.ops.sddmm import sddmm_op
from rosa_kernels.ops.spmm import spmm_op
from rosa_kernels.pattern import CsrPattern

# Where S is while the products run. "none": there is no S. "merged": the weight holds S already.
# "scatter": S is written into the weight for each product. "separate": S has a product of its own.
_NO_SPARSE, _MERGED, _SCATTER, _SEPARATE = "none", "merged", "scatter", "separate"
# One thread at a time may scatter S into a weight. A second thread would read the first one's W + S
# as W and restore that, so S would stay in the weight. One lock serves all weights, because weights
# may be tied. It is re-entrant, because a torch mode may run any code during a product.
_scattering = threading.RLock()


def rosa_linear(
    x: Tensor,
    weight: Tensor,
    pattern: CsrPattern | None = None,
    values: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    merged: bool = False,
    scatter: bool = False,
    dropout: float = 0.0,
    dropout_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear map plus a sparse and a low-rank branch, each of which is optional.

    Formula: y = x (W + S)^T + scaling * drop(x) A^T B^T + bias.

    S costs a product of its own unless one of two options is set:

    - `merged` promises that `weight` holds W + S already.
    - `scatter` writes S into `weight` for the length of each product, in forward and backward, and
      then restores the same bits. Calls from several threads take turns. Nothing else may read
      `weight` meanwhile, not even on another CUDA stream.

    Both options compute with round(W + S). No path forms the weight's gradient, and only a cast
    under autocast copies the weight.

    Shapes: x (..., n); weight (m, n), any strides; pattern (m, n); values (nnz,); lora_a (r, n) or
    (r,) int64; lora_b (m, r); bias (m,); dropout_mask like x, or (..., r) if lora_a is (r,)
    -> (..., m). For GPT-2's Conv1D, pass the transpose of its weight. An (r,) lora_a lists columns
    of x: it stands for rows of an identity matrix, and costs a gather. dropout_mask is True where
    an element is kept.
    Dtypes: x and weight have one dtype, except under autocast. values has x's dtype or float32.
    lora_a, lora_b and bias may be float32 too; they are rounded for the products. Autocast casts x,
    and casts the weight for the length of each product.
    Backward: grad_values = sddmm(pattern, dy^T, x^T), of values' dtype;
    grad_lora_b = scaling dy^T h with h = drop(x) A^T; grad_lora_a = scaling (dy B)^T drop(x);
    grad_x = dy (W + S) + scaling drop((dy B) A). x is saved once, if values or lora_a trains. h is
    saved if lora_b trains. The op is not twice differentiable.
    Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape or an unknown backend;
    RuntimeError for a wrong device, a changed pattern or a backend that cannot serve the call.
    RuntimeError also if weight requires grad.
    Source: Nikdan et al., RoSA, arXiv 2401.04679; Hu et al., LoRA, arXiv 2106.09685.
    """
    _checks.check_operands(x, weight, pattern, values, lora_a, lora_b, bias, merged, scatter)
    x = _checks.cast(x, weight)
    _checks.check_dtypes(x, values, lora_a, lora_b, bias)
    _checks.check_dropout(x, lora_a, dropout, dropout_mask)
    backend = registry.requested(backend)
    differentiate = _library.must_differentiate(x, values, lora_a, lora_b, bias)

    path, indices, transpose, plan = _NO_SPARSE, [], [], []
    if pattern is not None and values is not None:
        path = _MERGED if merged else _SCATTER if scatter else _SEPARATE
        indices = [pattern.crow_indices, pattern.col_indices]
        if differentiate or path == _SEPARATE:
            plan = _dispatch.plan_tensors(
                "sddmm", pattern, registry.backend_for_gradient("sddmm", backend)
            )
        if path == _SEPARATE and differentiate and x.requires_grad:
            transpose = _dispatch.backward_tensors(pattern, backend)
    args = (
        x,
        weight,
        bias,
        values,
        lora_a,
        lora_b,
        dropout_mask,
        indices,
        transpose,
        plan,
        float(scaling),
        float(dropout),
        path,
        backend,
    )
    if not _library.is_plain_eager():
        y, _ = rosa_linear_op(*args)
    elif differentiate:
        y, _ = _RosaLinear.apply(*args)
    else:
        y, _ = _library.below_autograd(_run, *args)
    return y


# -- forward ---------------------------------------------------------------------------------------


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_mask: Tensor | None,
    indices: list[Tensor],
    transpose: list[Tensor],
    plan: list[Tensor],
    scaling: float,
    dropout: float,
    path: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    flat = _tokens_by_features(x)
    dtype = x.dtype
    with _weight_for_product(weight, indices, values, path, backend, dtype) as w:
        y = torch.nn.functional.linear(flat, w, None if bias is None else bias.to(dtype))
    if path == _SEPARATE:
        crow, col = indices
        spmm_backend = registry.backend_for_gradient("spmm", backend)
        y += spmm_op(crow, col, transpose, plan, values, flat.t(), spmm_backend).t()
    if lora_a is None or lora_b is None:
        h = x.new_empty(0)
    else:
        h = _project(flat, lora_a, dropout_mask, dropout)
        # Adding into y saves two temporaries of y's size.
        y.addmm_(h, lora_b.to(dtype).t(), alpha=scaling)
    # Not `view`: the caller could not write in place to a view that an autograd function returns.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]]), h


def _composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_mask: Tensor | None,
    indices: list[Tensor],
    transpose: list[Tensor],
    plan: list[Tensor],
    scaling: float,
    dropout: float,
    path: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op made of differentiable ops, for forward-mode AD and the transforms of torch.func."""
    flat = _tokens_by_features(x)
    y = torch.nn.functional.linear(
        flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )
    if values is not None:
        # A merged weight holds S already. Subtracting the value keeps only the derivative.
        values = values - values.detach() if path == _MERGED else values
        spmm_backend = registry.backend_for_gradient("spmm", backend)
        y = y + spmm_op(*indices, transpose, plan, values, flat.t(), spmm_backend).t()
    if lora_a is not None and lora_b is not None:
        h = _project(flat, lora_a, dropout_mask, dropout)
        y = y + scaling * (h @ lora_b.to(x.dtype).t())
    return y.view(*x.shape[:-1], weight.shape[0]), x.new_empty(0)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lora_b = args[3]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    tokens = math.prod(x.shape[:-1])
    return y, x.new_empty(0) if lora_b is None else x.new_empty((tokens, lora_b.shape[1]))


def _tokens_by_features(x: Tensor) -> Tensor:
    """`x` (..., n) as the matrix (T, n). T is computed, because reshape(-1, n) fails if n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _project(flat: Tensor, lora_a: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """h (T, r) = drop(x) A^T. Dropout's factor 1 / (1 - p) scales h, which is smaller than x."""
    if lora_a.dim() == 1:
        h = _kept(flat.index_select(1, lora_a), mask)
    else:
        h = _kept(flat, mask) @ lora_a.to(flat.dtype).t()
    return h if mask is None else h.mul_(1 / (1 - dropout))


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` (T, ...) with zeros where the mask is False; `x` itself if there is no mask."""
    return x if mask is None else torch.where(mask.reshape(x.shape), x, 0.0)


@contextmanager
def _weight_for_product(
    weight: Tensor,
    indices: list[Tensor],
    values: Tensor | None,
    path: str,
    backend: str,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """The weight in `dtype`, for one product. On the scatter path it holds W + S meanwhile."""
    if path != _SCATTER:
        yield weight.to(dtype)
        return

    def kernel(op: str) -> Any:
        # The requested backend may have products only, as "dense" does; then take "auto".
        named = registry.backend_for_gradient(op, backend)
        if not any(kernel.named_by(named) for kernel in registry.kernels(op)):
            named = AUTO
        return choice.kernel_on_matrix(op, weight, named).run

    # These are kernels, not ops, because an op raises the weight's version. The weight is restored
    # before this returns, and a raised version would invalidate what autograd has saved of it.
    crow, col = indices
    gather, add_, scatter_ = map(kernel, ("csr_gather", "csr_add_", "csr_scatter_"))
    with _scattering:
        originals = gather(weight, crow, col)
        try:
            add_(weight, crow, col, values, 1.0)
            yield weight.to(dtype)
        finally:
            scatter_(weight, crow, col, originals)


# -- backward --------------------------------------------------------------------------------------


class _RosaLinear(_library.AutogradFunction):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        dropout_mask: Tensor | None,
        indices: list[Tensor],
        transpose: list[Tensor],
        plan: list[Tensor],
        *settings: Any,
    ) -> tuple[Tensor, Tensor]:
        args = (x, weight, bias, values, lora_a, lora_b, dropout_mask, indices, transpose, plan)
        forward = _run if _library.is_plain_eager() else rosa_linear_op
        y, h = _library.below_autograd(forward, *args, *settings)
        *_, path, _ = settings
        for_x, _, for_bias, for_values, for_a, for_b, *_ = ctx.needs_input_grad
        # Save only what the wanted gradients read.
        ctx.save_for_backward(
            x if for_values or for_a else None,
            weight if for_x else None,
            bias if for_bias else None,
            values if for_values or (for_x and path in (_SCATTER, _SEPARATE)) else None,
            lora_a if for_x or for_a else None,
            lora_b if for_x or for_a or for_b else None,
            dropout_mask if for_x or for_a else None,
            h if for_b else None,
            *indices,
            *transpose,
            *plan,
        )
        ctx.sizes = len(indices), len(transpose)
        ctx.settings = settings
        ctx.wanted = [for_x, for_bias, for_values, for_a, for_b]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return y, h

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "rosa_linear: expected to be differentiated once, got create_graph=True; spmm and "
                "csr_add are twice differentiable"
            )
        if grad is None:
            return (None,) * 14
        saved = ctx.saved_tensors  # read once: checkpointing unpacks them only once
        *tensors, h = saved[:8]
        rest = saved[8:]
        first, second = ctx.sizes[0], sum(ctx.sizes)
        indices, transpose, plan = rest[:first], rest[first:second], rest[second:]
        backward = _run_backward if _library.is_plain_eager() else rosa_linear_backward_op
        gradients = _library.below_autograd(
            backward,
            grad,
            *tensors,
            h,
            indices,
            transpose,
            plan,
            *ctx.settings,
            ctx.wanted,
            ctx.shape,
        )
        x, bias, values, a, b = (
            gradient if wanted else None
            for gradient, wanted in zip(gradients, ctx.wanted, strict=True)
        )
        return x, None, bias, values, a, b, *(None,) * 8


def _run_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_mask: Tensor | None,
    h: Tensor | None,
    indices: list[Tensor],
    transpose: list[Tensor],
    plan: list[Tensor],
    scaling: float,
    dropout: float,
    path: str,
    backend: str,
    wanted: list[bool],
    shape: list[int],
) -> tuple[Tensor, ...]:
    for_x, for_bias, for_values, for_a, for_b = wanted
    grad_x = grad_bias = grad_values = grad_a = grad_b = None
    dy = _tokens_by_features(grad)
    flat = None if x is None else _tokens_by_features(x)
    dtype = dy.dtype

    # Skinny products go to BLAS with their long side as columns. At r = 8 and 512 tokens of 2048
    # features, MKL takes 1.5 ms for dy^T h but 0.25 ms for (h^T dy)^T.
    g = None  # the gradient of h, (T, r)
    if lora_b is not None and (for_x or for_a):
        g = dy @ lora_b.to(dtype).t().contiguous().t()
        g.mul_(scaling / (1 - dropout))
    if for_a:
        assert g is not None
        assert flat is not None
        assert lora_a is not None
        grad_a = (g.t() @ _kept(flat, dropout_mask)).to(lora_a.dtype)
    if for_b:
        assert h is not None
        assert lora_b is not None
        grad_b = (h.t() @ dy).to(lora_b.dtype).mul_(scaling).t().contiguous()
    if for_values:
        assert flat is not None
        assert values is not None
        crow, col = indices
        sddmm_backend = registry.backend_for_gradient("sddmm", backend)
        grad_values = sddmm_op(crow, col, [], plan, dy.t(), flat.t(), values.dtype, sddmm_backend)
    if for_bias:
        assert bias is not None
        grad_bias = dy.sum(0, dtype=bias.dtype)
    # grad_x is by far the largest, so it comes last: it never lies beside the others' temporaries.
    if for_x:
        assert weight is not None
        with _weight_for_product(weight, indices, values, path, backend, dtype) as w:
            dx = dy @ w
        if path == _SEPARATE:
            assert values is not None
            crow_t, col_t, permutation, *plan_t = transpose
            values_t = values.index_select(0, permutation)
            spmm_backend = registry.backend_for_gradient("spmm", backend)
            dx += spmm_op(crow_t, col_t, [], plan_t, values_t, dy.t(), spmm_backend).t()
        if g is not None and lora_a is not None:
            if lora_a.dim() == 1:
                dx.index_add_(1, lora_a, _kept(g, dropout_mask))
            elif dropout_mask is None:
                dx.addmm_(g, lora_a.to(dtype))
            else:
                dx += _kept(g @ lora_a.to(dtype), dropout_mask)
        grad_x = dx.view(shape)
    gradients = (grad_x, grad_bias, grad_values, grad_a, grad_b)
    # Unwanted gradients are empty tensors, one each: outputs of an op may not share memory.
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    wanted, shape = args[-2:]
    alike = (None, bias, values, lora_a, lora_b)
    gradients = [
        like.new_empty(like.shape) if want and like is not None else grad.new_empty(0)
        for want, like in zip(wanted, alike, strict=True)
    ]
    return grad.new_empty(shape) if wanted[0] else grad.new_empty(0), *gradients[1:]


_TENSORS = "Tensor? bias, Tensor? values, Tensor? lora_a, Tensor? lora_b, Tensor? dropout_mask"
_SETTINGS = (
    "Tensor[] indices, Tensor[] transpose, Tensor[] plan, float scaling, float dropout, str path, "
    "str backend"
)
rosa_linear_op = _library.define(
    f"rosa_linear(Tensor x, Tensor weight, {_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _RosaLinear,
    differentiable=(0, 2, 3, 4, 5),
    composed=_composed,
)
rosa_linear_backward_op = _library.define(
    f"rosa_linear_backward(Tensor grad, Tensor? x, Tensor? weight, {_TENSORS}, Tensor? h, "
    f"{_SETTINGS}, bool[] wanted, SymInt[] shape) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
