"""From an op's flat arguments to the kernel that serves them."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.ops.csr_transpose import transpose_tensors
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.registry import Call, Kernel
from rosa_kernels.strides import readable_in_place
from rosa_kernels.tile_plan import sizes_of


def kernel_of_copies(op: str, w: Tensor, backend: str) -> Kernel:
    """The kernel for an op on a dense matrix that touches it at the pattern alone."""
    kernel = registry.settled(op, w.device.type, w.dtype, backend)
    if kernel is None:
        call = Call(w.device.type, w.dtype, tuple(w.shape), place=w.get_device())
        kernel = registry.select(op, call, backend)
    return kernel


def kernel_of_product(
    op: str,
    shape: tuple[int, ...],
    nnz: int,
    plan: list[Tensor],
    dense: tuple[Tensor, ...],
    other: torch.dtype,
    backend: str,
) -> Kernel:
    """The kernel for sddmm or spmm on these dense operands where it depends on more than dtype."""
    b = dense[-1]
    call = Call(
        b.device.type,
        b.dtype,
        shape,
        place=b.get_device(),
        nnz=nnz,
        plan=sizes_of(plan[0]) if plan else None,
        other=other,
        in_place=tuple(map(readable_in_place, dense)),
        exact=registry.gemm_is_exact(b.device.type, b.dtype),
    )
    return registry.select(op, call, backend)


def plan_tensors(op: str, pattern: CsrPattern, backend: str) -> list[Tensor]:
    """The pattern's tile plan if a kernel that may serve the op wants it, else [].

    Built on first use, which reads the indices back from the device. Neither a traced graph nor a
    captured one can hold that, so there only a plan that exists is handed on.
    """
    if not registry.reads_plan(op, pattern.device_type, backend):
        return []
    if not pattern.has_tile_plan and (
        torch.compiler.is_compiling()
        or (pattern.device_type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return []
    return pattern.tile_plan.tensors


def backward_tensors(pattern: CsrPattern, backend: str) -> list[Tensor]:
    """What a gradient on the transpose needs: its indices, the permutation, and its plan or none.

    That gradient is an spmm, for whichever op it is.
    """
    tensors = transpose_tensors(pattern)
    backend = registry.related("spmm", backend)
    if registry.reads_plan("spmm", pattern.device_type, backend):
        tensors += plan_tensors("spmm", pattern.T, backend)
    return tensors
