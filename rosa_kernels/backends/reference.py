"""The reference backend: every op in a few lines of plain PyTorch, on any device.

It is the oracle of the tests. It is written to be read, not to be fast: sddmm and spmm gather whole
rows, in slices of bounded size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.registry import register
from rosa_kernels.strides import empty_like_order

FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
DEVICES = {"cpu", "cuda"}
# Most gathered elements that are held at a time: 16 Mi elements are 64 MiB of float32.
_SLICE = 2**24


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_of(crow: Tensor, nnz: int) -> Tensor:
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff(), output_size=nnz)


def _slices(nnz: int, k: int) -> list[slice]:
    step = max(_SLICE // max(k, 1), 1)
    return [slice(start, start + step) for start in range(0, nnz, step)]


@register("sddmm", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def sddmm(crow: Tensor, col: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    wide = _accumulate_dtype(a.dtype)
    rows = _rows_of(crow, col.numel())
    out = a.new_empty(col.numel(), dtype=out_dtype)
    for s in _slices(col.numel(), a.shape[1]):
        products = a[rows[s]].to(wide) * b[col[s]].to(wide)
        out[s] = products.sum(1)
    return out


@register("spmm", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def spmm(crow: Tensor, col: Tensor, values: Tensor, b: Tensor) -> Tensor:
    wide = _accumulate_dtype(b.dtype)
    rows = _rows_of(crow, col.numel())
    c = torch.zeros(crow.numel() - 1, b.shape[1], dtype=wide, device=b.device)
    for s in _slices(col.numel(), b.shape[1]):
        c.index_add_(0, rows[s], values[s, None].to(wide) * b[col[s]].to(wide))
    return empty_like_order(b, c.shape[0]).copy_(c)


@register("csr_add_", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def csr_add_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float) -> None:
    wide = _accumulate_dtype(w.dtype)
    at = (_rows_of(crow, col.numel()), col.long())
    w[at] = (w[at].to(wide) + alpha * values.to(wide)).to(w.dtype)


@register("csr_gather", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def csr_gather(w: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    return w[_rows_of(crow, col.numel()), col.long()]


@register("csr_scatter_", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def csr_scatter_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> None:
    w[_rows_of(crow, col.numel()), col.long()] = values.to(w.dtype)


# The dense kernels use the next two ops. `w` is a slab of the whole matrix's rows, so `crow` begins
# at `first`. `col` is the whole pattern's.


@register("csr_gather_slab", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def csr_gather_slab(w: Tensor, crow: Tensor, col: Tensor, first: int, out: Tensor) -> None:
    nnz = out.numel()
    out.copy_(w[_rows_of(crow, nnz), col[first : first + nnz].long()])


@register("csr_scatter_slab_", "reference", devices=DEVICES, dtypes=FLOATS, priority=0)
def csr_scatter_slab_(w: Tensor, crow: Tensor, col: Tensor, first: int, values: Tensor) -> None:
    nnz = values.numel()
    w[_rows_of(crow, nnz), col[first : first + nnz].long()] = values


@register("csr_transpose", "reference", devices=DEVICES, dtypes={torch.int32}, priority=0)
def csr_transpose(crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows_of(crow, col.numel())
    permutation = torch.argsort(col, stable=True)
    crow_t = crow.new_zeros(n + 1)
    crow_t[1:] = torch.bincount(col, minlength=n).cumsum(0)
    return crow_t, rows[permutation].int(), permutation.int()
