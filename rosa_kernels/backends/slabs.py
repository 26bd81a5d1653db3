"""Slabs: ranges of rows. Dense kernels process one at a time, to never hold a dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from rosa_kernels.tile_plan import SLABS, slab_offsets

# Bytes that one slab should have at most. It then stays in L2 between the GEMM and the gather: GPUs
# with fast GEMMs have 40 to 50 MB of L2.
SLAB_BYTES = 32 << 20
# Bytes that a slab may have if rows are so long that SLABS slabs of SLAB_BYTES are not enough.
MOST_SLAB_BYTES = 64 << 20


class Slab(NamedTuple):
    """Rows [begin, end) and their CSR entries [first, last)."""

    begin: int
    end: int
    first: int
    last: int


@lru_cache(maxsize=1024)
def slab_edges(rows: int, row_bytes: int) -> tuple[int, ...] | None:
    """Edges of the fewest slabs of at most SLAB_BYTES. Edge s is row rows * s // SLABS.

    If SLABS such slabs are not enough, their limit is MOST_SLAB_BYTES. None if that is not enough.
    """

    def fit(count: int, most: int) -> tuple[int, ...] | None:
        edges = tuple(SLABS * i // count for i in range(count + 1))
        at = [rows * s // SLABS for s in edges]
        tallest = max(b - a for a, b in pairwise(at))
        return edges if tallest * row_bytes <= most else None

    for count in range(1, SLABS + 1):
        edges = fit(count, SLAB_BYTES)
        if edges is not None:
            return edges
    return fit(SLABS, MOST_SLAB_BYTES)


def slabs_of(crow: Tensor, plan: Sequence[Tensor], row_bytes: int) -> list[Slab]:
    """The slabs of a matrix whose rows take `row_bytes` bytes each.

    The entries come from the plan's header. Without a plan they are read from `crow`, and the host
    waits for that if `crow` is on a device.

    Raises:
        ValueError: the rows do not fit SLABS slabs of MOST_SLAB_BYTES.
    """
    rows = crow.numel() - 1
    edges = slab_edges(rows, row_bytes)
    if edges is None:
        raise ValueError(f"expected rows that fit {SLABS} slabs of {MOST_SLAB_BYTES} bytes")
    at = [rows * s // SLABS for s in edges]
    offsets = [slab_offsets(plan[0])[s] for s in edges] if plan else crow[at].tolist()
    return [
        Slab(*x)
        for x in zip(at[:-1], at[1:], offsets[:-1], offsets[1:], strict=True)
        if x[0] < x[1]
    ]
