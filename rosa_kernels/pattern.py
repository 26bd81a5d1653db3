"""CsrPattern: an immutable CSR sparsity pattern, and all that is derived from it."""

from __future__ import annotations

import operator
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rosa_kernels import choice
from rosa_kernels.files import read_safetensors
from rosa_kernels.kernel import Call
from rosa_kernels.tile_plan import HEAVY_FILL, TilePlan, default_tile

if TYPE_CHECKING:
    import scipy.sparse

INT32_MAX = 2**31 - 1
_FORMAT_VERSION = "1"
# Tiles of the statistic `heavy_tiles`: 64 x 64, heavy from 0.8 % nonzeros up.
_TILE, _HEAVY_FILL = 64, 0.008


class _Transpose(NamedTuple):
    """The transpose of a pattern, kept by the pattern.

    Attributes:
        get: returns the transpose, or None if it no longer exists.
        indices: the transpose's crow_indices and col_indices.
        permutation: the transpose has the values ``values[permutation]``.
        inverse: the pattern has the values ``values_of_the_transpose[inverse]``.
    """

    get: Callable[[], CsrPattern | None]
    indices: tuple[Tensor, Tensor]
    permutation: Tensor
    inverse: Tensor


class CsrPattern:
    """The positions of the nonzeros of an (m, n) sparse matrix, without their values.

    Entry t, for t from 0 to nnz - 1, is at (i_t, j_t). Row i has the entries from crow_indices[i]
    up to crow_indices[i + 1]. Their columns, in col_indices, are strictly increasing.

    The constructor validates the index tensors, which reads them back from the device. No op
    validates them again. They are kept as int32. Contiguous int32 tensors are not copied, except
    those whose memory torch does not own, such as a numpy array's. If the tensors are changed in
    place afterwards, the ops detect it and raise RuntimeError. They cannot detect a change through
    ``.data`` or through a numpy array made from a tensor. On the meta device, only lengths are
    validated. Build patterns outside torch.compile: validation reads data.

    Args:
        crow_indices: (m + 1,) row pointers, int32 or int64.
        col_indices: (nnz,) column indices, int32 or int64, on the same device.
        shape: (m, n).

    Raises:
        TypeError: the index tensors are not int32 or int64, or the shape is not of integers.
        ValueError: a rank or length is wrong, or a size is 2**31 or more. Row pointers are not
            monotone from 0 to nnz. Columns are negative, out of range, unsorted or repeated.
        RuntimeError: the index tensors are on different devices, or torch.compile is tracing.
    """

    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]
    device_type: str  # kept, because `device.type` costs ops 0.3 us a call

    def __init__(self, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]) -> None:
        _refuse_compiling()
        m, n = _check_shape(shape)
        _check_index_tensor("crow_indices", crow_indices)
        _check_index_tensor("col_indices", col_indices)
        if crow_indices.device != col_indices.device:
            raise RuntimeError(
                "CsrPattern: expected crow_indices and col_indices on one device, "
                f"got {crow_indices.device} and {col_indices.device}"
            )
        if crow_indices.numel() != m + 1:
            raise ValueError(
                f"CsrPattern: expected crow_indices of length m + 1 = {m + 1}, "
                f"got {crow_indices.numel()}"
            )
        _check_indices(crow_indices, col_indices, n)
        self._assign(_to_int32(crow_indices), _to_int32(col_indices), (m, n))

    def _assign(self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> None:
        self.crow_indices = crow_indices
        self.col_indices = col_indices
        self.shape = shape
        self.device_type = col_indices.device.type
        self._versions = (crow_indices._version, col_indices._version)
        self._derived: dict[str, Any] = {}

    @classmethod
    def _trusted(cls, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> CsrPattern:
        """A pattern from index tensors that were derived from a validated one."""
        pattern = cls.__new__(cls)
        pattern._assign(crow, col, shape)
        return pattern

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_mask(cls, mask: Tensor) -> CsrPattern:
        """The pattern of the nonzero entries of a dense (m, n) mask of any dtype.

        Raises:
            TypeError: the mask is not a dense tensor. For a sparse one, see :meth:`from_torch`.
            ValueError: it is not 2-D, or is on the meta device and has no entries to read.
        """
        _refuse_compiling()
        if not isinstance(mask, Tensor) or mask.layout is not torch.strided:
            got = mask.layout if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"CsrPattern.from_mask: expected a dense tensor, got {got}")
        if mask.is_meta:
            raise ValueError("CsrPattern.from_mask: expected a mask with data, got one on meta")
        if mask.dim() != 2:
            raise ValueError(
                f"CsrPattern.from_mask: expected a 2-D mask, got shape {tuple(mask.shape)}"
            )
        shape = _check_shape(mask.shape)
        mask = mask != 0
        rows, cols = mask.nonzero(as_tuple=True)  # row-major order: sorted already
        return cls(_row_pointers(rows, shape[0]), cols, shape)

    @classmethod
    def from_coo(cls, rows: Tensor, cols: Tensor, shape: Sequence[int]) -> CsrPattern:
        """The pattern of nonzeros at (rows[t], cols[t]), in any order but without repeats."""
        _refuse_compiling()
        m, n = _check_shape(shape)
        _check_index_tensor("rows", rows)
        _check_index_tensor("cols", cols)
        if rows.numel() != cols.numel():
            raise ValueError(
                "CsrPattern.from_coo: expected rows and cols of one length, "
                f"got {rows.numel()} and {cols.numel()}"
            )
        for name, index, size in (("rows", rows, m), ("cols", cols, n)):
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
                raise ValueError(
                    f"CsrPattern.from_coo: expected {name} in [0, {size}), "
                    f"got values from {int(index.min())} to {int(index.max())}"
                )
        flat = (rows.long() * n + cols.long()).sort().values
        if n == 0:
            return cls(_row_pointers(rows.long(), m), cols, (m, n))
        return cls(_row_pointers(flat // n, m), flat % n, (m, n))

    @classmethod
    def from_torch(cls, sparse_csr: Tensor) -> CsrPattern:
        """The pattern of a ``torch.sparse_csr`` tensor; its values are ``sparse_csr.values()``."""
        if not isinstance(sparse_csr, Tensor):
            raise TypeError(
                f"CsrPattern.from_torch: expected a tensor, got {type(sparse_csr).__name__}"
            )
        if sparse_csr.layout is not torch.sparse_csr or sparse_csr.dim() != 2:
            raise TypeError(
                "CsrPattern.from_torch: expected a 2-D tensor of layout torch.sparse_csr, "
                f"got {sparse_csr.layout} of shape {tuple(sparse_csr.shape)}"
            )
        # The indices are cloned, because a view of a sparse tensor cannot enter torch.compile.
        return cls(
            sparse_csr.crow_indices().clone(),
            sparse_csr.col_indices().clone(),
            _check_shape(sparse_csr.shape),
        )

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> CsrPattern:
        """The pattern of a scipy sparse matrix's stored entries, in canonical CSR order."""
        if not hasattr(matrix, "tocsr"):
            raise TypeError(
                "CsrPattern.from_scipy: expected a scipy sparse matrix, "
                f"got {type(matrix).__name__}"
            )
        csr = matrix.tocsr(copy=True)
        csr.sum_duplicates()
        return cls(torch.from_numpy(csr.indptr), torch.from_numpy(csr.indices), csr.shape)

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """nnz / (m * n); 0 for an empty matrix."""
        m, n = self.shape
        return self.nnz / (m * n) if m and n else 0.0

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.col_indices.device

    def __repr__(self) -> str:
        m, n = self.shape
        return (
            f"CsrPattern({m} x {n}, nnz={self.nnz}, density={self.density:.3%}, "
            f"device={str(self.device)!r})"
        )

    # -- derived structure: built on first use, then kept ------------------------------------------

    @property
    def T(self) -> CsrPattern:
        """The pattern of the transpose; ``p.T.T is p`` holds while p is alive."""
        return self._transpose()[0]

    @property
    def transpose_permutation(self) -> Tensor:
        """(nnz,) int32: the transpose has the values ``values[transpose_permutation]``."""
        return self._transpose()[1]

    @property
    def has_transpose(self) -> bool:
        """Whether the transpose has been built already."""
        return "transpose" in self._derived

    def _transpose(self) -> tuple[CsrPattern, Tensor]:
        """The transpose and its permutation."""
        kept = self._derived.get("transpose")
        if kept is not None:
            transpose = kept.get()
            if transpose is None:
                crow, col = kept.indices
                transpose = CsrPattern._trusted(crow, col, (self.shape[1], self.shape[0]))
                self._keep_transpose(transpose, kept.permutation, kept.inverse)
            return transpose, kept.permutation
        m, n = self.shape
        with torch.inference_mode(False):
            # The op is called, not its kernel: torch.compile can trace an op, and the traced code
            # fills this cache, too.
            crow_t, col_t, permutation = torch.ops.rosa.csr_transpose(
                self.crow_indices, self.col_indices, n
            )
            transpose = CsrPattern._trusted(crow_t, col_t, (n, m))
            order = torch.arange(self.nnz, dtype=torch.int32, device=self.device)
            inverse = torch.zeros_like(order).scatter(0, permutation.long(), order)
        if _has_data(inverse):
            self._keep_transpose(transpose, permutation, inverse)
        return transpose, permutation

    def _keep_transpose(self, transpose: CsrPattern, permutation: Tensor, inverse: Tensor) -> None:
        """Keep `transpose`, which refers back weakly: reference counts free the pair."""
        there = transpose.crow_indices, transpose.col_indices
        here = self.crow_indices, self.col_indices
        self._derived["transpose"] = _Transpose(lambda: transpose, there, permutation, inverse)
        transpose._derived["transpose"] = _Transpose(weakref.ref(self), here, inverse, permutation)

    @property
    def tile_plan(self) -> TilePlan:
        """The plan that CUDA kernels read. The transpose's plan is ``p.T.tile_plan``.

        The first access builds it on the host, in milliseconds, and reads the indices back from a
        device once. The tiles are 128 x 256 on a CUDA device of compute capability 9.0, else
        128 x 128. :meth:`build_tile_plan` makes other tiles.

        An op builds the plan if a kernel needs it. ``torch.compile`` and CUDA graph capture cannot
        build it, so touch ``p.tile_plan`` before them.
        """
        return self._derived.get("tile_plan") or self.build_tile_plan()

    @property
    def has_tile_plan(self) -> bool:
        """Whether the tile plan has been built already."""
        return "tile_plan" in self._derived

    def build_tile_plan(
        self,
        tile_rows: int | None = None,
        tile_cols: int | None = None,
        heavy_fill: float = HEAVY_FILL,
    ) -> TilePlan:
        """Build :attr:`tile_plan` again, with other tile edges or another threshold.

        Args:
            tile_rows, tile_cols: multiples of 16 whose product is at most 65,536. The default is
                the device's default tile.
            heavy_fill: the share of nonzeros from which a tile is heavy.

        Raises:
            ValueError: no plan can have these edges or this threshold.
        """
        rows, cols = default_tile(self.device)
        plan = self.make_tile_plan(
            rows if tile_rows is None else tile_rows,
            cols if tile_cols is None else tile_cols,
            heavy_fill,
        )
        if _has_data(plan.blob):
            self._derived["tile_plan"] = plan
        return plan

    def make_tile_plan(self, tile_rows: int, tile_cols: int, heavy_fill: float) -> TilePlan:
        """Build a tile plan as :meth:`build_tile_plan` does, but do not keep it."""
        self.check_unchanged()
        crow, col = self.crow_indices.cpu(), self.col_indices.cpu()
        m, n = self.shape
        kernel = choice.select("tile_plan", Call("cpu", torch.int32, (m, n)))
        with torch.inference_mode(False):
            start = time.perf_counter()
            header, blob = kernel.run(crow, col, n, tile_rows, tile_cols, heavy_fill)
            seconds = time.perf_counter() - start
            return TilePlan(header, blob.to(self.device), seconds)

    @property
    def row_nnz(self) -> Tensor:
        """(m,) int32 number of nonzeros of each row."""
        return self._once("row_nnz", lambda: self.crow_indices.diff())

    @property
    def col_nnz(self) -> Tensor:
        """(n,) int32 number of nonzeros of each column."""
        return self._once(
            "col_nnz",
            lambda: torch.bincount(self.col_indices, minlength=self.shape[1]).int(),
        )

    @property
    def row_swizzle(self) -> Tensor:
        """(m,) int32 rows by descending nnz, ties by row. Neighbours then have similar work."""
        return self._once(
            "row_swizzle",
            lambda: torch.argsort(self.row_nnz, descending=True, stable=True).int(),
        )

    @property
    def row_indices(self) -> Tensor:
        """(nnz,) int32 row of each nonzero: the COO companion of col_indices."""
        return self._once(
            "row_indices",
            lambda: torch.repeat_interleave(
                torch.arange(self.shape[0], dtype=torch.int32, device=self.device),
                self.row_nnz,
                output_size=self.nnz,
            ),
        )

    def _once(self, name: str, build: Any) -> Any:
        if name in self._derived:
            return self._derived[name]
        with torch.inference_mode(False):  # training may save what inference builds
            value = build()
        if not isinstance(value, Tensor) or _has_data(value):
            self._derived[name] = value
        return value

    def stats(self) -> dict[str, float]:
        """The numbers that decide the speed of a kernel on this pattern.

        Returns a dict with these keys:
            nnz, density: as the properties.
            empty_rows, empty_cols: share of rows and columns without a nonzero.
            max_row_nnz: number of nonzeros in the fullest row.
            row_cov: coefficient of variation of the rows' nnz.
            top_rows, top_cols: share of nnz in the fullest tenth of the rows and of the columns.
            heavy_tiles: share of heavy tiles, once rows and columns are sorted by nnz. These tiles
                are 64 x 64, and heavy from 0.8 % nonzeros up.
            heavy_nnz: share of nnz inside these heavy tiles.
        """
        return dict(self._once("stats", self._compute_stats))

    def _compute_stats(self) -> dict[str, float]:
        m, n = self.shape
        rows, cols = self.row_nnz.double().cpu(), self.col_nnz.double().cpu()
        nnz = max(self.nnz, 1)

        def top_tenth(counts: Tensor) -> float:
            return float(counts.topk(max(len(counts) // 10, 1)).values.sum()) / nnz

        stats = {
            "nnz": self.nnz,
            "density": self.density,
            "empty_rows": float((rows == 0).double().mean()) if m else 0.0,
            "empty_cols": float((cols == 0).double().mean()) if n else 0.0,
            "max_row_nnz": int(rows.max()) if m else 0,
            "row_cov": float(rows.std(correction=0) / rows.mean()) if self.nnz else 0.0,
            "top_rows": top_tenth(rows) if m else 0.0,
            "top_cols": top_tenth(cols) if n else 0.0,
            "heavy_tiles": 0.0,
            "heavy_nnz": 0.0,
        }
        if self.nnz:
            tiles_m, tiles_n = -(-m // _TILE), -(-n // _TILE)
            row_rank = torch.argsort(torch.argsort(rows, descending=True, stable=True))
            col_rank = torch.argsort(torch.argsort(cols, descending=True, stable=True))
            tile = (row_rank[self.row_indices.cpu().long()] // _TILE) * tiles_n
            tile += col_rank[self.col_indices.cpu().long()] // _TILE
            counts = torch.bincount(tile, minlength=tiles_m * tiles_n)
            heavy = counts >= _HEAVY_FILL * _TILE * _TILE
            stats["heavy_tiles"] = float(heavy.double().mean())
            stats["heavy_nnz"] = float(counts[heavy].sum()) / nnz
        return stats

    # -- movement and storage ----------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise RuntimeError if an index tensor was written to since it was validated."""
        if (self.crow_indices._version, self.col_indices._version) != self._versions:
            raise RuntimeError(
                "CsrPattern: expected unchanged index tensors, got tensors changed in place since; "
                "build a new CsrPattern from them"
            )

    @torch.inference_mode(mode=False)
    def to(self, device: torch.device | str) -> CsrPattern:
        """This pattern on `device`, with all that has been derived from it and its transpose.

        A tile plan with this device's default tile is left out if `device` has another default. A
        plan with any other tile always moves along.
        """
        device = torch.device(device)
        crow, col = self.crow_indices.to(device), self.col_indices.to(device)
        if crow is self.crow_indices and col is self.col_indices:
            return self
        self.check_unchanged()
        moved = self._moved(crow, col)
        if self.has_transpose:
            t, permutation = self._transpose()
            inverse = self._derived["transpose"].inverse
            t = t._moved(t.crow_indices.to(device), t.col_indices.to(device))
            moved._keep_transpose(t, permutation.to(device), inverse.to(device))
        return moved

    def _moved(self, crow: Tensor, col: Tensor) -> CsrPattern:
        """This pattern with index tensors on another device, without the transpose."""
        moved = CsrPattern._trusted(crow, col, self.shape)
        here, there = self.device, moved.device
        for name, value in self._derived.items():
            if isinstance(value, Tensor):
                moved._derived[name] = value.to(there)
            elif isinstance(value, TilePlan):
                # A user asked for any tile that is not the default here, so such a plan is kept.
                if value.tile != default_tile(here) or value.tile == default_tile(there):
                    moved._derived[name] = value.to(there)
            elif name == "stats":
                moved._derived[name] = value
        return moved

    def to_torch(self, values: Tensor) -> Tensor:
        """The ``torch.sparse_csr`` tensor with this pattern and `values` (nnz,)."""
        if not isinstance(values, Tensor):
            raise TypeError(f"CsrPattern.to_torch: expected a tensor, got {type(values).__name__}")
        if values.shape != (self.nnz,):
            raise ValueError(
                f"CsrPattern.to_torch: expected values of shape ({self.nnz},), "
                f"got {tuple(values.shape)}"
            )
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, values, size=self.shape, check_invariants=False
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pattern to `path` as safetensors: int32 indices and the int64 shape."""
        from safetensors.torch import save_file

        self.check_unchanged()
        tensors = {
            "crow_indices": self.crow_indices.cpu().contiguous(),
            "col_indices": self.col_indices.cpu().contiguous(),
            "shape": torch.tensor(self.shape, dtype=torch.int64),
        }
        # Cloned: safetensors refuses tensors that share memory, and a user's views may.
        tensors = {name: t.clone() for name, t in tensors.items()}
        save_file(tensors, path, metadata={"format": "rosa_kernels.CsrPattern", "version": "1"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CsrPattern:
        """Read a pattern written by :meth:`save`, and validate it like any other.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not such a pattern, or its indices are not valid.
        """
        tensors, metadata = read_safetensors(path, "CsrPattern.load")
        expected = {"crow_indices", "col_indices", "shape"}
        if set(tensors) != expected or metadata.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"CsrPattern.load: expected tensors {sorted(expected)} in format version "
                f"{_FORMAT_VERSION}, got {sorted(tensors)} in version {metadata.get('version')} "
                f"in {os.fspath(path)}"
            )
        shape = tensors["shape"]
        if shape.dtype != torch.int64 or shape.shape != (2,):
            raise ValueError(
                f"CsrPattern.load: expected shape as 2 int64 numbers, got {shape.dtype} of shape "
                f"{tuple(shape.shape)} in {os.fspath(path)}"
            )
        try:
            return cls(tensors["crow_indices"], tensors["col_indices"], tuple(shape.tolist()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, in {os.fspath(path)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return CsrPattern, (self.crow_indices, self.col_indices, self.shape)


# torch.load with weights_only=True, its default, may build patterns: the constructor validates.
torch.serialization.add_safe_globals([CsrPattern])


def _refuse_compiling() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "CsrPattern: expected to be built outside torch.compile and torch.export, got a call "
            "that is traced; validation reads the indices"
        )


def _has_data(x: Tensor) -> bool:
    """Whether `x` may be kept: it is no tensor of a fake, functional or transformed computation.

    Dynamo traces with fake tensors. The code that it makes keeps real ones.
    """
    return torch.compiler.is_dynamo_compiling() or (
        type(x) is Tensor
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _check_shape(shape: Sequence[int]) -> tuple[int, int]:
    try:
        sizes = [operator.index(size) for size in shape]
    except TypeError:
        raise TypeError(f"CsrPattern: expected a shape (m, n) of integers, got {shape}") from None
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"CsrPattern: expected a shape (m, n) of sizes >= 0, got {tuple(shape)}")
    m, n = sizes
    if max(m, n) > INT32_MAX:
        raise ValueError(
            f"CsrPattern: expected dimensions below 2**31 (indices are int32), got {(m, n)}"
        )
    return m, n


def _check_index_tensor(name: str, index: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"CsrPattern: expected {name} to be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"CsrPattern: expected {name} of dtype int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"CsrPattern: expected {name} to be 1-D, got shape {tuple(index.shape)}")
    if index.numel() > INT32_MAX:
        raise ValueError(
            f"CsrPattern: expected fewer than 2**31 entries in {name}, got {index.numel()}"
        )


def _check_indices(crow: Tensor, col: Tensor, n: int) -> None:
    if crow.is_meta:
        return
    nnz = col.numel()
    first, last = int(crow[0]), int(crow[-1])
    if first != 0 or last != nnz:
        raise ValueError(
            f"CsrPattern: expected crow_indices to run from 0 to nnz = {nnz}, got {first} to {last}"
        )
    # Row pointers are compared, not subtracted, because a difference may wrap round.
    decreasing = crow[1:] < crow[:-1]
    if bool(decreasing.any()):
        row = int(decreasing.nonzero()[0])
        raise ValueError(
            "CsrPattern: expected non-decreasing crow_indices, got "
            f"{int(crow[row])} then {int(crow[row + 1])} at row {row}"
        )
    if nnz == 0:
        return
    low, high = int(col.min()), int(col.max())
    if low < 0 or high >= n:
        raise ValueError(
            f"CsrPattern: expected col_indices in [0, {n}), got values from {low} to {high}"
        )
    # Columns increase strictly, except where a row starts.
    increasing = col[1:] > col[:-1]
    starts = crow[1:-1].long()
    increasing[starts[(starts > 0) & (starts < nnz)] - 1] = True
    if not bool(increasing.all()):
        t = int((~increasing).nonzero()[0])
        row = int(torch.searchsorted(crow, torch.tensor(t, device=crow.device), right=True)) - 1
        what = "repeated" if int(col[t]) == int(col[t + 1]) else "unsorted"
        raise ValueError(
            "CsrPattern: expected sorted, unique col_indices within each row, got "
            f"{what} columns {int(col[t])}, {int(col[t + 1])} in row {row}"
        )


def _to_int32(index: Tensor) -> Tensor:
    # Tensors made in inference mode have no version and cannot be saved for a backward. Memory that
    # torch does not own, as a numpy array's, may change without a new version.
    with torch.inference_mode(False):
        index = index.to(torch.int32).contiguous()
        borrowed = not index.untyped_storage().resizable()
        return index.clone() if index.is_inference() or borrowed else index


def _row_pointers(rows: Tensor, m: int) -> Tensor:
    crow = torch.zeros(m + 1, dtype=torch.int64, device=rows.device)
    crow[1:] = torch.bincount(rows, minlength=m).cumsum(0)
    return crow
