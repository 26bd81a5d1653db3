"""The native backend "cpu", and the checks that all adapters to a native module share.

Only this module imports ``_C``. native_cuda.py adapts the CUDA functions of ``_C``.

``_C`` takes addresses, so all that it relies on is checked before. CsrPattern checks the indices.
The ops check shapes, dtypes and devices. This module compares the lengths once more, because users
can call the flat ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.registry import register
from rosa_kernels.strides import empty_like_order

try:
    from rosa_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING: str | None = f"is not built ({error}); run `make` or `cmake -B build && ...`"
else:
    MISSING = None

MODULE: Any = _C
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FLOATS = set(_DTYPES)
_ISAS = {"avx512": 2, "avx2": 1, "portable": 0}

Csr = tuple[int, int, int, int, int]


def address(x: Tensor) -> int:
    """The address of a tensor's memory, which ``_C`` reads or writes.

    Raises:
        RuntimeError: the tensor has elements but no memory, as a FakeTensor.
    """
    pointer = x.data_ptr()
    if not pointer and x.numel():
        raise RuntimeError(f"expected tensors with memory, got a {type(x).__name__} without data")
    return pointer


def csr_of(crow: Tensor, col: Tensor, n: int) -> Csr:
    """The checked addresses and sizes of a pattern, as ``_C`` takes them."""
    if not (
        crow.dtype is torch.int32
        and col.dtype is torch.int32
        and crow.is_contiguous()
        and col.is_contiguous()
        and crow.dim() == col.dim() == 1
        and crow.shape[0] > 0
    ):
        raise ValueError("expected contiguous 1-D int32 index tensors with m + 1 row pointers")
    return address(crow), address(col), crow.shape[0] - 1, n, col.shape[0]


def dtype_code(x: Tensor) -> int:
    code = _DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(f"expected a tensor of a floating dtype among {_FLOATS}, got {x.dtype}")
    return code


def csr_of_w(w: Tensor, crow: Tensor, col: Tensor) -> Csr:
    """:func:`csr_of` of a pattern that must have as many rows as the dense matrix `w`."""
    csr = csr_of(crow, col, w.shape[1])
    if w.shape[0] != csr[2]:
        raise ValueError(f"expected w of {csr[2]} rows, got {tuple(w.shape)}")
    return csr


def check_operands(csr: Csr, a: Tensor, b: Tensor) -> None:
    """Check that sddmm's operands have the pattern's rows, one k and one dtype."""
    if a.shape[0] != csr[2] or a.shape[1] != b.shape[1] or a.dtype != b.dtype:
        raise ValueError(
            f"expected a ({csr[2]}, {b.shape[1]}) of dtype {b.dtype}, "
            f"got {tuple(a.shape)} of dtype {a.dtype}"
        )


def matrix_of(x: Tensor) -> tuple[int, int, int, int, int, int]:
    rows, cols = x.shape
    s0, s1 = x.stride()
    return address(x), dtype_code(x), rows, cols, s0, s1


def vector_of(x: Tensor, size: int) -> tuple[int, int, int, int]:
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"expected {size} values, got {tuple(x.shape)}")
    return address(x), dtype_code(x), size, x.stride(0)


def workspace_bytes(
    op: str, variant: str, csr: Csr, k: int, dtype: torch.dtype, threads: int
) -> int:
    """Bytes of scratch memory that sddmm or spmm allocates beside its result."""
    ask = _C.sddmm_workspace_bytes if op == "sddmm" else _C.spmm_workspace_bytes
    return ask(csr, k, _DTYPES[dtype], threads, _ISAS[variant])


def _sddmm(variant: str) -> Callable[..., Tensor]:
    def run(crow: Tensor, col: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        csr = csr_of(crow, col, b.shape[0])
        check_operands(csr, a, b)
        # The number of threads is read once, because the workspace must fit it.
        threads = torch.get_num_threads()
        scratch = workspace_bytes("sddmm", variant, csr, a.shape[1], a.dtype, threads)
        work = col.new_empty(scratch, dtype=torch.uint8)
        out = a.new_empty(col.shape[0], dtype=out_dtype)
        _C.sddmm(
            csr,
            matrix_of(a),
            matrix_of(b),
            vector_of(out, csr[4]),
            address(work),
            threads,
            _ISAS[variant],
        )
        return out

    return run


def _spmm(variant: str) -> Callable[..., Tensor]:
    def run(crow: Tensor, col: Tensor, values: Tensor, b: Tensor) -> Tensor:
        csr = csr_of(crow, col, b.shape[0])
        threads = torch.get_num_threads()
        scratch = workspace_bytes("spmm", variant, csr, b.shape[1], b.dtype, threads)
        work = col.new_empty(scratch, dtype=torch.uint8)
        c = empty_like_order(b, csr[2])
        _C.spmm(
            csr,
            vector_of(values, csr[4]),
            matrix_of(b),
            matrix_of(c),
            address(work),
            threads,
            _ISAS[variant],
        )
        return c

    return run


for _name, _isa in _ISAS.items():
    _common: dict[str, Any] = {
        "variant": _name,
        "devices": {"cpu"},
        "dtypes": _FLOATS,
        "priority": 100 + _isa,
        "unavailable": MISSING
        or (None if _C.isa_available(_isa) else f"needs a machine and a build with {_name}"),
    }
    register("sddmm", "cpu", **_common)(_sddmm(_name))
    register("spmm", "cpu", **_common)(_spmm(_name))


@register("csr_add_", "cpu", devices={"cpu"}, dtypes=_FLOATS, priority=100, unavailable=MISSING)
def csr_add_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float) -> None:
    csr = csr_of_w(w, crow, col)
    _C.csr_add_(matrix_of(w), csr, vector_of(values, csr[4]), alpha, torch.get_num_threads())


@register("csr_gather", "cpu", devices={"cpu"}, dtypes=_FLOATS, priority=100, unavailable=MISSING)
def csr_gather(w: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    csr = csr_of_w(w, crow, col)
    out = w.new_empty(col.shape[0])
    _C.csr_gather(matrix_of(w), csr, vector_of(out, csr[4]), torch.get_num_threads())
    return out


@register("csr_scatter_", "cpu", devices={"cpu"}, dtypes=_FLOATS, priority=100, unavailable=MISSING)
def csr_scatter_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> None:
    csr = csr_of_w(w, crow, col)
    _C.csr_scatter_(matrix_of(w), csr, vector_of(values, csr[4]), torch.get_num_threads())


@register(
    "csr_transpose",
    "cpu",
    devices={"cpu"},
    dtypes={torch.int32},
    priority=100,
    unavailable=MISSING,
)
def csr_transpose(crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    csr = csr_of(crow, col, n)
    crow_t = crow.new_empty(n + 1)
    col_t, permutation = torch.empty_like(col), torch.empty_like(col)
    _C.csr_transpose(csr, address(crow_t), address(col_t), address(permutation))
    return crow_t, col_t, permutation


@register(
    "tile_plan", "cpu", devices={"cpu"}, dtypes={torch.int32}, priority=100, unavailable=MISSING
)
def tile_plan(
    crow: Tensor, col: Tensor, n: int, tile_rows: int, tile_cols: int, heavy_fill: float
) -> tuple[Tensor, Tensor]:
    plan = _C.tile_plan(csr_of(crow, col, n), tile_rows, tile_cols, heavy_fill)
    blob = col.new_empty(plan.blob_size)
    plan.copy_blob(address(blob))
    return torch.tensor(plan.header, dtype=torch.int64, device="cpu"), blob
