"""The input checks that ops share. An error says what was expected and got, before any kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.pattern import INT32_MAX, CsrPattern
from rosa_kernels.strides import overlaps_itself

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pattern(op: str, pattern: CsrPattern) -> None:
    if not isinstance(pattern, CsrPattern):
        raise TypeError(f"{op}: expected a CsrPattern, got {type(pattern).__name__}")
    if not torch.compiler.is_compiling():
        pattern.check_unchanged()


def check_matrix(op: str, name: str, x: Tensor, pattern: CsrPattern) -> None:
    _check_on_pattern(op, name, x, pattern)
    if x.dim() != 2:
        raise ValueError(f"{op}: expected {name} to be 2-D, got shape {tuple(x.shape)}")
    # A traced size is not compared: the comparison would bound a dynamic dimension of torch.export.
    if not torch.compiler.is_compiling() and max(x.shape) > INT32_MAX:
        raise ValueError(
            f"{op}: expected {name} with dimensions below 2**31, got shape {tuple(x.shape)}"
        )


def check_values(
    op: str, values: Tensor, pattern: CsrPattern, dtype: torch.dtype | None = None
) -> None:
    """Check that `values` has shape (nnz,), and has `dtype` or float32 if `dtype` is given."""
    _check_on_pattern(op, "values", values, pattern)
    if values.dim() != 1 or values.shape[0] != pattern.nnz:
        raise ValueError(
            f"{op}: expected values of shape (nnz,) = ({pattern.nnz},), got {tuple(values.shape)}"
        )
    if dtype is not None:
        check_values_dtype(op, "values", values.dtype, dtype)


def check_values_dtype(op: str, name: str, got: torch.dtype, dense: torch.dtype) -> None:
    if got != dense and (got != torch.float32 or dense == torch.float64):
        allowed = f"{dense}" if dense in (torch.float32, torch.float64) else f"{dense} or float32"
        raise TypeError(f"{op}: expected {name} of dtype {allowed}, got {got}")


def check_same_dtype(op: str, a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: expected a and b of one dtype, got {a.dtype} and {b.dtype}")


def check_target(op: str, w: Tensor, values: Tensor, instead: str) -> None:
    """Check that `w` can be written in place, and that no gradient is lost by writing.

    `instead` is the advice in the error message.
    """
    if w.requires_grad:
        raise RuntimeError(
            f"{op}: expected a target that does not require grad, got one that does; {instead}, or "
            "pass w.detach() to change its data"
        )
    if values.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected values that do not require grad in grad mode, got values that do; "
            f"{instead}, or use torch.no_grad()"
        )
    if overlaps_itself(w):
        raise RuntimeError(
            f"{op}: expected a target whose elements do not share memory, got shape "
            f"{tuple(w.shape)} with strides {w.stride()}; call clone() first"
        )
    if not torch.compiler.is_compiling() and w.is_neg():
        raise RuntimeError(
            f"{op}: expected a target that holds its own values, got a lazily negated view; "
            "call resolve_neg() first"
        )


def check_not_inference(op: str, w: Tensor) -> None:
    """Check that `w` is no tensor of inference mode outside that mode, as torch's own ops do."""
    if torch.compiler.is_compiling() or not w.is_inference():
        return
    if not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: expected a target that may be written outside inference mode, got an inference "
            "tensor; clone() it, or write within torch.inference_mode()"
        )


def check_size(op: str, name: str, x: Tensor, dim: int, size: int, what: str) -> None:
    """Check the size of one dimension of `x`; `what` holds {} in place of the size.

    Only the error path formats `what`, because Dynamo cannot trace that.
    """
    if x.shape[dim] != size:
        raise ValueError(
            f"{op}: expected {name} to have {what.format(size)}, got shape {tuple(x.shape)}"
        )


def autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands, cast to the autocast dtype if autocast is on. float64 stays float64."""
    device = operands[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in operands)


def check_tensor(op: str, name: str, x: Tensor, device: torch.device | None = None) -> None:
    """Check that `x` is a dense floating-point tensor, and is on `device` if one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: expected {name} to be dense (torch.strided), got {x.layout}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: expected {name} of dtype float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if device is not None and x.device != device:
        raise RuntimeError(f"{op}: expected {name} on {device}, got {x.device}")


def _check_on_pattern(op: str, name: str, x: Tensor, pattern: CsrPattern) -> None:
    check_tensor(op, name, x)
    if x.device != pattern.col_indices.device:
        raise RuntimeError(
            f"{op}: expected {name} on the pattern's device {pattern.device}, got {x.device}"
        )


def check_shape_of_pattern(op: str, name: str, x: Tensor, pattern: CsrPattern) -> None:
    if tuple(x.shape) != pattern.shape:
        raise ValueError(
            f"{op}: expected {name} of the pattern's shape {pattern.shape}, got {tuple(x.shape)}"
        )
