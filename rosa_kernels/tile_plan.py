"""TilePlan: what the CUDA kernels need besides a pattern's indices, built once on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A tile is heavy, which means worth a dense product, from this share of nonzeros on.
HEAVY_FILL = 0.011
# A plan divides the rows into this many slabs. It holds the CSR offset of each edge on the host.
SLABS = 32


class PlanSizes(NamedTuple):
    """The first integers of a plan's header, in its order. A cost model needs only these.

    Attributes:
        rows, cols, nnz: sizes of the pattern.
        tile_rows, tile_cols: edges of a tile.
        active_rows, active_cols: number of rows and columns with a nonzero.
        row_sectors, col_sectors: number of groups of 16 neighbouring rows or columns that include
            an active one.
        tiles: number of heavy tiles.
        heavy_nnz: number of nonzeros inside heavy tiles.
    """

    rows: int
    cols: int
    nnz: int
    tile_rows: int
    tile_cols: int
    active_rows: int
    active_cols: int
    row_sectors: int
    col_sectors: int
    tiles: int
    heavy_nnz: int

    @property
    def light_nnz(self) -> int:
        """Number of nonzeros outside the heavy tiles."""
        return self.nnz - self.heavy_nnz


_FIELDS = len(PlanSizes._fields)
HEADER = _FIELDS + SLABS + 1


def sizes_of(header: Tensor) -> PlanSizes:
    """The sizes in a plan's header, which never changes. They are kept: reading them takes 1 us."""
    sizes: PlanSizes | None = getattr(header, "_rosa_sizes", None)
    if sizes is None:
        sizes = PlanSizes._make(header.tolist()[:_FIELDS])
        header._rosa_sizes = sizes  # type: ignore[attr-defined]
    return sizes


def slab_offsets(header: Tensor) -> list[int]:
    """SLABS + 1 CSR offsets: offset s is the first entry of row rows * s // SLABS."""
    return header.tolist()[_FIELDS:]


def default_tile(device: torch.device) -> tuple[int, int]:
    """The default tile (rows, columns) of a plan for `device`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return 128, 256  # wgmma's width, and a quarter fewer operand bytes than 128 x 128
    return 128, 128


class TilePlan:
    """A pattern's rows and columns sorted by nnz, its heavy tiles, and the nonzeros outside them.

    Once rows and columns are sorted, 5-16 % of the tiles hold 99 % of a real mask's nonzeros.
    :attr:`CsrPattern.tile_plan` builds the plan. Kernels read its two tensors.

    Attributes:
        header: int64 sizes on the host, so that a launch need not read them from the device.
        blob: int32 arrays, one after the other, on the pattern's device. They are listed in
            cpp/include/rosa/tile_plan.h.
        seconds: time that building the plan took. 0 for a plan that came from another device.
    """

    def __init__(self, header: Tensor, blob: Tensor, seconds: float = 0.0) -> None:
        self.header = header
        self.blob = blob
        self.seconds = seconds

    @property
    def tensors(self) -> list[Tensor]:
        """The header and the blob, as the flat ops take them."""
        return [self.header, self.blob]

    @property
    def sizes(self) -> PlanSizes:
        """The sizes in the header."""
        return sizes_of(self.header)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        sizes = self.sizes
        return sizes.tile_rows, sizes.tile_cols

    def stats(self) -> dict[str, float]:
        """The numbers that decide the speed of the kernels that use the plan.

        Returns a dict with these keys:
            tile_rows, tile_cols: edges of a tile.
            tiles: number of heavy tiles.
            heavy_nnz: share of nnz inside heavy tiles.
            area: share of the matrix that heavy tiles cover. It may exceed 1, because tiles
                overhang a small matrix.
            light_nnz: number of nonzeros outside heavy tiles.
            active_rows, active_cols: number of rows and columns with a nonzero.
            bytes: bytes of both tensors.
            seconds: time that building the plan took.
        """
        s = self.sizes
        return {
            "tile_rows": s.tile_rows,
            "tile_cols": s.tile_cols,
            "tiles": s.tiles,
            "heavy_nnz": s.heavy_nnz / max(s.nnz, 1),
            "area": s.tiles * s.tile_rows * s.tile_cols / max(s.rows * s.cols, 1),
            "light_nnz": s.light_nnz,
            "active_rows": s.active_rows,
            "active_cols": s.active_cols,
            "bytes": self.header.nbytes + self.blob.nbytes,
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """:meth:`stats` in four lines."""
        s, of = self.stats(), self.sizes
        return "\n".join(
            (
                f"TilePlan of {of.rows} x {of.cols}, nnz {of.nnz}, on {self.blob.device}",
                f"  active: {of.active_rows} rows, {of.active_cols} columns",
                f"  heavy: {of.tiles} tiles of {of.tile_rows} x {of.tile_cols} with "
                f"{s['heavy_nnz']:.1%} of nnz in {s['area']:.1%} of the area; light: "
                f"{of.light_nnz} nonzeros",
                f"  {s['bytes'] / 1e6:.2f} MB, built in {s['seconds'] * 1e3:.1f} ms",
            )
        )

    __str__ = summary

    def __repr__(self) -> str:
        s = self.sizes
        return (
            f"TilePlan({s.rows} x {s.cols}, {s.tiles} heavy tiles of {s.tile_rows} x "
            f"{s.tile_cols}, device={str(self.blob.device)!r})"
        )

    def to(self, device: torch.device | str) -> TilePlan:
        """This plan with its blob on `device`; the header stays on the host."""
        blob = self.blob.to(device)
        return self if blob is self.blob else TilePlan(self.header, blob)
