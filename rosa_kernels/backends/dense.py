"""The backend "dense": torch's GEMM in slabs of rows, so that no dense m x n matrix is ever held.

On a GPU, multiplying everything and keeping the nonzeros is fastest on a mask that is even and
dense enough. On a CPU, the kernels of "cpu" have priority over it. There a nonzero costs two to
three times its share of the GEMM, so sparse kernels win easily at RoSA's few percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from rosa_kernels import choice
from rosa_kernels.backends import cost
from rosa_kernels.backends.slabs import MOST_SLAB_BYTES, SLAB_BYTES, slab_edges, slabs_of
from rosa_kernels.kernel import Call
from rosa_kernels.registry import register
from rosa_kernels.strides import empty_like_order, gemm_operand
from rosa_kernels.tile_plan import SLABS

_FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_DEVICES = {"cpu", "cuda"}


def _gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which the operands of a GEMM are converted. The result has at least float32.

    A GEMM that writes bfloat16 may also add its partial sums in bfloat16. On CUDA, the result's
    dtype is an argument of torch.mm. On a CPU, it is the operands' dtype.
    """
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32


def _product(x: Tensor, y: Tensor) -> Tensor:
    if x.element_size() == 2:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y)


def _no_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Disable autocast, which would round the GEMM's operands."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _reject(call: Call, row_bytes: int) -> str | None:
    rows = call.shape[0]
    if call.device_type == "cuda" and call.plan is None:
        return (
            "needs the pattern's tile plan, to know on the host where slabs of rows begin: touch "
            "pattern.tile_plan before torch.compile or graph capture"
        )
    if not call.exact:
        name = str(call.dtype).removeprefix("torch.")
        return f"multiplies {name} in full precision only, which torch's current settings do not"
    if slab_edges(rows, row_bytes) is None:
        needed = -(-rows // SLABS) * row_bytes
        return f"works in at most {SLABS} slabs of {MOST_SLAB_BYTES} bytes, got {needed} bytes each"
    return None


def _reject_sddmm(call: Call) -> str | None:
    width = 8 if call.dtype == torch.float64 else 4
    return _reject(call, call.shape[2] * width)


def _reject_spmm(call: Call) -> str | None:
    if call.device_type == "cuda" and call.values_dtype not in (None, call.dtype):
        return f"takes values of b's dtype {call.dtype}, got {call.values_dtype}"
    return _reject(call, _spmm_row_bytes(call.shape[1], call.dtype, call.device_type))


def _spmm_row_bytes(n: int, dtype: torch.dtype, device: str) -> int:
    return n * (dtype.itemsize if device == "cuda" else max(dtype.itemsize, 4))


@register(
    "sddmm",
    "dense",
    devices=_DEVICES,
    dtypes=_FLOATS,
    priority=1,
    reject=_reject_sddmm,
    cost=cost.dense_sddmm,
    reads_plan={"cuda"},
)
def sddmm(
    crow: Tensor,
    col: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    plan: Sequence[Tensor] = (),
) -> Tensor:
    """Multiply each slab of a's rows by all of b, then gather the slab's entries."""
    if a.shape[0] != crow.numel() - 1:
        raise ValueError(f"expected a of {crow.numel() - 1} rows, got {tuple(a.shape)}")
    dtype = _gemm_dtype(a)
    left, right = gemm_operand(a).to(dtype), gemm_operand(b).to(dtype).t()
    wide = torch.promote_types(dtype, torch.float32)
    out = a.new_empty(col.numel(), dtype=wide)
    with _no_autocast(a):
        for slab in slabs_of(crow, plan, b.shape[0] * wide.itemsize):
            if slab.first == slab.last:
                continue
            products = _product(left[slab.begin : slab.end], right)
            gather = choice.kernel_on_matrix("csr_gather_slab", products)
            at = crow[slab.begin : slab.end + 1]
            gather.run(products, at, col, slab.first, out[slab.first : slab.last])
            del products  # else the next slab's would be allocated beside it
    return out.to(out_dtype)


@register(
    "spmm",
    "dense",
    devices=_DEVICES,
    dtypes=_FLOATS,
    priority=1,
    reject=_reject_spmm,
    cost=cost.dense_spmm,
    reads_plan={"cuda"},
    finite_only=True,
)
def spmm(
    crow: Tensor, col: Tensor, values: Tensor, b: Tensor, plan: Sequence[Tensor] = ()
) -> Tensor:
    """Write each slab of S's rows out as a dense matrix, then multiply it by b.

    The zeros are multiplied too, so an Inf or NaN in b spreads over its whole column of c.
    """
    m, (n, k) = crow.numel() - 1, b.shape
    if values.numel() != col.numel():
        raise ValueError(f"expected {col.numel()} values, got {tuple(values.shape)}")
    dtype = _gemm_dtype(b)
    right, values = gemm_operand(b).to(dtype), values.to(dtype)
    c = empty_like_order(b, m)
    with _no_autocast(b):
        for slab in slabs_of(crow, plan, _spmm_row_bytes(n, b.dtype, b.device.type)):
            rows = slice(slab.begin, slab.end)
            if slab.first == slab.last:
                c[rows] = 0
                continue
            dense = right.new_zeros(slab.end - slab.begin, n)
            scatter = choice.kernel_on_matrix("csr_scatter_slab_", dense)
            at = crow[slab.begin : slab.end + 1]
            scatter.run(dense, at, col, slab.first, values[slab.first : slab.last])
            # The products, in float32 at least, may take as many bytes again as a slab.
            step = max(SLAB_BYTES // (max(dtype.itemsize, 4) * dense.shape[0]), 1)
            for start in range(0, k, step):
                tokens = slice(start, start + step)
                # The product has c's stride order, so that the copy need not transpose it.
                if c.stride(0) < c.stride(1):
                    c.t()[tokens, rows] = _product(right[:, tokens].t(), dense.t())
                else:
                    c[rows, tokens] = _product(dense, right[:, tokens])
            del dense
    return c
