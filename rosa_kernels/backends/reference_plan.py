"""The reference tile plan: the arrays of cpp/include/rosa/tile_plan.h in plain PyTorch.

It serves if the native library is not built. The tests compare the native plan with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rosa_kernels.registry import register
from rosa_kernels.tile_plan import SLABS, PlanSizes

_SECTOR = 16


def _axis(count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position, order and sectors of rows or columns that have `count` nonzeros each."""
    active = int((count > 0).sum())
    order = torch.argsort(count, descending=True, stable=True)[:active]
    position = torch.full_like(count, -1)
    position[order] = torch.arange(active)
    return position, order, torch.unique(order // _SECTOR)


@register("tile_plan", "reference", devices={"cpu"}, dtypes={torch.int32}, priority=0)
def tile_plan(
    crow: Tensor, col: Tensor, n: int, tile_rows: int, tile_cols: int, heavy_fill: float
) -> tuple[Tensor, Tensor]:
    edges = (tile_rows, tile_cols)
    if any(e <= 0 or e % _SECTOR for e in edges) or tile_rows * tile_cols > 65536:
        raise ValueError(
            "tile_plan: expected tile edges that are multiples of 16 and at most 65,536 elements, "
            f"got {tile_rows} x {tile_cols}"
        )
    if not heavy_fill >= 0:
        raise ValueError(f"tile_plan: expected a heavy fill of 0 or more, got {heavy_fill}")
    crow, cols, m, nnz = crow.long(), col.long(), crow.numel() - 1, col.numel()
    rows = torch.repeat_interleave(torch.arange(m), crow.diff(), output_size=nnz)
    row_position, row_order, row_sectors = _axis(crow.diff())
    col_position, col_order, col_sectors = _axis(torch.bincount(cols, minlength=n))
    p, q = row_position[rows], col_position[cols]

    strips, across = -(-len(row_order) // tile_rows), -(-len(col_order) // tile_cols)
    tile, of_entry, count = torch.unique(
        p // tile_rows * across + q // tile_cols, return_inverse=True, return_counts=True
    )
    area = tile_rows * tile_cols
    need = max(math.ceil(min(heavy_fill * area, area + 1)), 1)
    is_heavy = count >= need
    heavy_tile, heavy = tile[is_heavy], is_heavy[of_entry].nonzero().flatten()
    heavy = heavy[torch.argsort(of_entry[heavy], stable=True)]
    light = (~is_heavy[of_entry]).nonzero().flatten()
    light = light[torch.argsort(p[light] * max(len(col_order), 1) + q[light])]
    boundaries = torch.arange(strips + 1)
    across = max(across, 1)

    arrays = [
        *(row_position, row_order, row_sectors),
        *(col_position, col_order, col_sectors),
        torch.stack((heavy_tile // across, heavy_tile % across), 1),
        torch.cat((torch.zeros(1).long(), count[is_heavy].cumsum(0))),
        torch.searchsorted(heavy_tile // across, boundaries),
        torch.searchsorted(p[light], boundaries * tile_rows),
        p[heavy] % tile_rows * tile_cols + q[heavy] % tile_cols,
        torch.cat((heavy, light)),
        *(p[light], q[light]),
    ]
    sizes = PlanSizes(
        m,
        n,
        nnz,
        *edges,
        *(len(row_order), len(col_order), len(row_sectors), len(col_sectors)),
        *(len(heavy_tile), len(heavy)),
    )
    slabs = crow[torch.arange(SLABS + 1) * m // SLABS]
    header = torch.cat((torch.tensor(sizes), slabs))
    return header, torch.cat([array.flatten() for array in arrays]).int()
