"""The input checks of rosa_linear, which run before any product."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.bounds import FRACTION_BELOW_1
from rosa_kernels.ops import _validate
from rosa_kernels.pattern import CsrPattern


def check_operands(
    x: Tensor,
    weight: Tensor,
    pattern: CsrPattern | None,
    values: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    merged: bool,
    scatter: bool,
) -> None:
    op = "rosa_linear"
    _validate.check_tensor(op, "x", x)
    _validate.check_tensor(op, "weight", weight, x.device)
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight to be 2-D, got shape {tuple(weight.shape)}")
    if weight.requires_grad:
        raise RuntimeError(
            f"{op}: expected a frozen weight, got one that requires grad, which this op does not "
            "compute; call weight.requires_grad_(False), or use torch.nn.functional.linear"
        )
    m, n = weight.shape
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(
            f"{op}: expected x of shape (..., {n}) for a weight of shape {(m, n)}, "
            f"got {tuple(x.shape)}"
        )
    if (pattern is None) != (values is None):
        missing, given = ("values", "pattern") if values is None else ("pattern", "values")
        raise ValueError(
            f"{op}: expected pattern and values together, got {given} but no {missing}"
        )
    if (lora_a is None) != (lora_b is None):
        missing, given = ("lora_b", "lora_a") if lora_b is None else ("lora_a", "lora_b")
        raise ValueError(f"{op}: expected lora_a and lora_b together, got {given} but no {missing}")
    if merged and scatter:
        raise ValueError(f"{op}: expected merged or scatter, got both")
    if pattern is None and (merged or scatter):
        name = "merged" if merged else "scatter"
        raise ValueError(f"{op}: expected a pattern and values with {name}=True, got none")
    if pattern is not None and values is not None:
        _validate.check_pattern(op, pattern)
        if pattern.shape != (m, n):
            raise ValueError(
                f"{op}: expected a pattern of the weight's shape {(m, n)}, got {pattern.shape}"
            )
        _validate.check_values(op, values, pattern)
        _validate.check_tensor(op, "weight", weight, pattern.device)
        if scatter:
            _validate.check_target(op, weight, values.detach(), "use scatter=False")
            # The values are added to the weight. Under autocast x's dtype may differ from it.
            _validate.check_values_dtype(op, "values", values.dtype, weight.dtype)
    if lora_a is not None and lora_b is not None:
        _check_low_rank(lora_a, lora_b, weight)
    if bias is not None:
        _validate.check_tensor(op, "bias", bias, x.device)
        if bias.shape != (m,):
            raise ValueError(f"{op}: expected bias of shape ({m},), got {tuple(bias.shape)}")


def _check_low_rank(lora_a: Tensor, lora_b: Tensor, weight: Tensor) -> None:
    op = "rosa_linear"
    m, n = weight.shape
    _validate.check_tensor(op, "lora_b", lora_b, weight.device)
    if lora_b.dim() != 2 or lora_b.shape[0] != m:
        raise ValueError(f"{op}: expected lora_b of shape ({m}, r), got {tuple(lora_b.shape)}")
    rank = lora_b.shape[1]
    if isinstance(lora_a, Tensor) and lora_a.dtype == torch.int64 and lora_a.dim() == 1:
        if lora_a.shape[0] != rank:
            raise ValueError(
                f"{op}: expected lora_a to name r={rank} columns like lora_b, got {lora_a.shape[0]}"
            )
        return
    _validate.check_tensor(op, "lora_a", lora_a, weight.device)
    if lora_a.shape != (rank, n):
        raise ValueError(f"{op}: expected lora_a of shape {(rank, n)}, got {tuple(lora_a.shape)}")


def cast(x: Tensor, weight: Tensor) -> Tensor:
    (x,) = _validate.autocast(x)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"rosa_linear: expected x of the weight's dtype {weight.dtype}, got {x.dtype}"
        )
    return x


def check_dtypes(x: Tensor, values: Tensor | None, *others: Tensor | None) -> None:
    if values is not None:
        _validate.check_values_dtype("rosa_linear", "values", values.dtype, x.dtype)
    for name, tensor in zip(("lora_a", "lora_b", "bias"), others, strict=True):
        if tensor is not None and tensor.is_floating_point():
            _validate.check_values_dtype("rosa_linear", name, tensor.dtype, x.dtype)


def check_dropout(x: Tensor, lora_a: Tensor | None, dropout: float, mask: Tensor | None) -> None:
    op = "rosa_linear"
    FRACTION_BELOW_1.check(op, dropout, "dropout")
    if mask is None:
        if dropout:
            raise ValueError(f"{op}: expected a dropout_mask with dropout={dropout}, got none")
        return
    if lora_a is None:
        raise ValueError(f"{op}: expected lora_a and lora_b with a dropout_mask, got none")
    shape = (*x.shape[:-1], lora_a.shape[0]) if lora_a.dim() == 1 else tuple(x.shape)
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != x.device:
        raise ValueError(
            f"{op}: expected dropout_mask of dtype torch.bool and shape {shape} on {x.device}, "
            f"got {mask.dtype} and {tuple(mask.shape)} on {mask.device}"
        )
