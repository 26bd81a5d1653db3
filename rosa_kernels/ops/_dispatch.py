"""From an op's flat arguments to the kernel that serves them: one call in every op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosa_kernels import choice, registry
from rosa_kernels.kernel import Call
from rosa_kernels.ops.csr_transpose import transpose_tensors
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.strides import readable_in_place
from rosa_kernels.tile_plan import sizes_of


def run_on_matrix(op: str, w: Tensor, backend: str, *args: Any) -> Any:
    """Run the kernel that serves csr_add_, csr_gather or csr_scatter_ on w and the arguments."""
    return choice.kernel_on_matrix(op, w, backend).run(w, *args)


def run_product(
    op: str,
    indices: tuple[Tensor, Tensor],
    dense: tuple[Tensor, ...],
    values_dtype: torch.dtype,
    plan: list[Tensor],
    backend: str,
    *args: Any,
) -> Tensor:
    """Run the kernel that serves sddmm or spmm, on the indices and further arguments.

    `dense` and `values_dtype` are what it is chosen by, unless one is known to serve all.
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
    backend = registry.backend_for_gradient("spmm", backend)
    if registry.reads_plan("spmm", pattern.device_type, backend):
        tensors += plan_tensors("spmm", pattern.T, backend)
    return tensors
