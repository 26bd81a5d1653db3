"""Questions about strides that ops and backends share."""

from __future__ import annotations

from torch import Tensor


def empty_like_order(b: Tensor, rows: int) -> Tensor:
    """An uninitialised (rows, k) matrix in the stride order of `b` (n, k)."""
    k = b.shape[1]
    if b.stride(0) < b.stride(1):
        return b.new_empty((k, rows)).t()
    return b.new_empty((rows, k))


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of `x` may share memory: no dimension may step inside the others."""
    if x.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False
