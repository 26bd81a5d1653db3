"""Chooses the kernel for an op's flat arguments and runs it; the plan tensors that ops pass on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosa_kernels import choice, registry
from rosa_kernels.kernel import Call
from rosa_kernels.ops.csr_transpose import transpose_tensors
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.strides import readable_in_place, share_memory
from rosa_kernels.tile_plan import sizes_of


def run_on_matrix(op: str, w: Tensor, backend: str, *args: Any) -> Any:
    """Choose the kernel of csr_add_, csr_gather or csr_scatter_ for w, and run it."""
    return choice.kernel_on_matrix(op, w, backend).run(w, *args)


def run_in_place(op: str, w: Tensor, backend: str, *args: Any) -> None:
    """Run csr_add_ or csr_scatter_, whose kernels read values while they write w."""
    values = args[2]
    # The first check costs 0.3 us, the second 3 us of a small call's 24.
    if torch._C._is_alias_of(w, values) and share_memory(w, values):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{op}: expected values that share no memory with the target, got some that do; call "
            "values.clone() first"
        )
    run_on_matrix(op, w, backend, *args)


def run_product(
    op: str,
    indices: tuple[Tensor, Tensor],
    dense: tuple[Tensor, ...],
    values_dtype: torch.dtype,
    plan: list[Tensor],
    backend: str,
    *args: Any,
) -> Tensor:
    """Choose the kernel of sddmm or spmm, and run it on `indices` and `args`.

    The choice depends on `indices`, `dense` (the dense operands), `values_dtype` and `plan`. It is
    skipped if one kernel is known to serve every call of this device type and dtype.
    """
    b = dense[-1]
    kernel = choice.cached_kernel(op, b.device.type, b.dtype, backend)
    if kernel is None:
        crow, col = indices
        rows = crow.shape[0] - 1
        call = Call(
            b.device.type,
            b.dtype,
            (rows, b.shape[1], b.shape[0]) if op == "sddmm" else (rows, *b.shape),
            device=b.get_device(),
            nnz=col.shape[0],
            plan=sizes_of(plan[0]) if plan else None,
            values_dtype=values_dtype,
            in_place=tuple(map(readable_in_place, dense)),
            exact=choice.gemm_is_exact(b.device.type, b.dtype),
        )
        kernel = choice.select(op, call, backend)
    if kernel.reads_plan:
        return kernel.run(*indices, *args, plan)
    return kernel.run(*indices, *args)


def plan_tensors(op: str, pattern: CsrPattern, backend: str) -> list[Tensor]:
    """The pattern's tile plan if a kernel that may serve the op reads it, else [].

    The plan is built on first use, which copies the indices from the device to the host. A traced,
    fake or captured computation cannot contain that copy. There the plan is passed on only if it
    exists.
    """
    if not registry.reads_plan(op, pattern.device_type, backend):
        return []
    if not pattern.has_tile_plan and (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (pattern.device_type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return []
    return pattern.tile_plan.tensors


def backward_tensors(pattern: CsrPattern, backend: str) -> list[Tensor]:
    """The tensors for an spmm with the transpose, which computes a gradient in every op's backward.

    They are the transpose's indices, the permutation, and the transpose's tile plan if a kernel
    reads it.
    """
    tensors = transpose_tensors(pattern)
    backend = registry.backend_for_gradient("spmm", backend)
    if registry.reads_plan("spmm", pattern.device_type, backend):
        tensors += plan_tensors("spmm", pattern.T, backend)
    return tensors
