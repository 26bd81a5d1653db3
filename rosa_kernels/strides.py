"""Helpers for strides that ops and backends share."""

from __future__ import annotations

from torch import Tensor


def empty_like_order(b: Tensor, rows: int) -> Tensor:
    """An uninitialised (rows, k) matrix in the stride order of `b` (n, k)."""
    k = b.shape[1]
    if b.stride(0) < b.stride(1):
        return b.new_empty((k, rows)).t()
    return b.new_empty((rows, k))


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of `x` may share memory.

    They do not if each stride is at least the extent of all dimensions of smaller stride.
    """
    if x.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def addresses(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements, and the one after the last."""
    start = x.data_ptr()
    if x.numel() == 0:
        return start, start
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return start, start + (last + 1) * x.element_size()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` may share memory with one of `b`.

    Row blocks and column blocks of one matrix do not, such as the parts of a fused weight.
    """
    (start, end), (other, last) = addresses(a), addresses(b)
    if a.device != b.device or start >= last or other >= end:
        return False
    if a.dtype != b.dtype or a.stride() != b.stride() or a.dim() != 2 or min(a.stride()) != 1:
        return True
    pitch = max(a.stride())
    column = a.stride().index(1)
    between, odd = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    after = between % pitch
    return bool(odd) or after < a.shape[column] or after + b.shape[column] > pitch


def readable_in_place(x: Tensor) -> bool:
    """Whether kernels can read the rows of a matrix as vectors of 16 bytes, without a copy."""
    size = x.element_size()
    return (
        x.stride(1) == 1
        and x.shape[1] * size % 16 == 0
        and x.stride(0) * size % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def gemm_operand(x: Tensor) -> Tensor:
    """`x` if a GEMM can read its strides, else a copy, which the GEMM would make in every call."""
    (rows, cols), (s0, s1) = x.shape, x.stride()
    if (s1 == 1 and s0 >= max(cols, 1)) or (s0 == 1 and s1 >= max(rows, 1)):
        return x
    return x.contiguous()
