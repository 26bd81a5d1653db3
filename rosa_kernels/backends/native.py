"""The native backend "cpu": the one checked adapter between tensors and the unsafe ``_C``.

``_C`` takes addresses. What it relies on is proven here or before: indices by CsrPattern, shapes,
dtypes and devices by the ops; the lengths are compared once more, since the flat ops are callable.
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
    _MISSING: str | None = f"is not built ({error}); run `make` or `cmake -B build && ...`"
else:
    _MISSING = None

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FLOATS = set(_DTYPES)
_ISAS = {"avx512": 2, "avx2": 1, "portable": 0}

Csr = tuple[int, int, int, int, int]


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def csr_of(crow: Tensor, col: Tensor, n: int) -> Csr:
    """The checked addresses and sizes of a pattern, as ``_C`` takes them."""
    _expect(
        crow.dtype is torch.int32
        and col.dtype is torch.int32
        and crow.is_contiguous()
        and col.is_contiguous()
        and crow.dim() == col.dim() == 1
        and crow.shape[0] > 0,
        "expected contiguous 1-D int32 index tensors with m + 1 row pointers",
    )
    return crow.data_ptr(), col.data_ptr(), crow.shape[0] - 1, n, col.shape[0]


def _dtype(x: Tensor) -> int:
    code = _DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(f"expected a tensor of a floating dtype among {_FLOATS}, got {x.dtype}")
    return code


def _matrix(x: Tensor) -> tuple[int, int, int, int, int, int]:
    rows, cols = x.shape
    s0, s1 = x.stride()
    return x.data_ptr(), _dtype(x), rows, cols, s0, s1


def _vector(x: Tensor, size: int) -> tuple[int, int, int, int]:
    _expect(x.dim() == 1 and x.shape[0] == size, f"expected {size} values, got {tuple(x.shape)}")
    return x.data_ptr(), _dtype(x), size, x.stride(0)


def workspace_bytes(
    op: str, variant: str, csr: Csr, k: int, dtype: torch.dtype, threads: int
) -> int:
    """Scratch that sddmm or spmm allocates beside its result."""
    ask = _C.sddmm_workspace_bytes if op == "sddmm" else _C.spmm_workspace_bytes
    return ask(csr, k, _DTYPES[dtype], threads, _ISAS[variant])


def _sddmm(variant: str) -> Callable[..., Tensor]:
    def run(crow: Tensor, col: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        csr = csr_of(crow, col, b.shape[0])
        _expect(
            a.shape[0] == csr[2] and a.shape[1] == b.shape[1] and a.dtype == b.dtype,
            f"expected a ({csr[2]}, {b.shape[1]}) of dtype {b.dtype}, "
            f"got {tuple(a.shape)} of dtype {a.dtype}",
        )
        # Read once: the workspace must fit the threads that use it.
        threads = torch.get_num_threads()
        scratch = workspace_bytes("sddmm", variant, csr, a.shape[1], a.dtype, threads)
        work = col.new_empty(scratch, dtype=torch.uint8)
        out = a.new_empty(col.shape[0], dtype=out_dtype)
        _C.sddmm(
            csr,
            _matrix(a),
            _matrix(b),
            _vector(out, csr[4]),
            work.data_ptr(),
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
            _vector(values, csr[4]),
            _matrix(b),
            _matrix(c),
            work.data_ptr(),
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
        "unavailable": _MISSING
        or (None if _C.isa_available(_isa) else f"needs a machine and a build with {_name}"),
    }
    register("sddmm", "cpu", **_common)(_sddmm(_name))
    register("spmm", "cpu", **_common)(_spmm(_name))


@register("csr_add_", "cpu", devices={"cpu"}, dtypes=_FLOATS, priority=100, unavailable=_MISSING)
def csr_add_(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float) -> None:
    csr = csr_of(crow, col, w.shape[1])
    _expect(w.shape[0] == csr[2], f"expected w of {csr[2]} rows, got {tuple(w.shape)}")
    _C.csr_add_(_matrix(w), csr, _vector(values, csr[4]), alpha, torch.get_num_threads())


@register("csr_gather", "cpu", devices={"cpu"}, dtypes=_FLOATS, priority=100, unavailable=_MISSING)
def csr_gather(w: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    csr = csr_of(crow, col, w.shape[1])
    _expect(w.shape[0] == csr[2], f"expected w of {csr[2]} rows, got {tuple(w.shape)}")
    out = w.new_empty(col.shape[0])
    _C.csr_gather(_matrix(w), csr, _vector(out, csr[4]), torch.get_num_threads())
    return out


@register(
    "csr_transpose",
    "cpu",
    devices={"cpu"},
    dtypes={torch.int32},
    priority=100,
    unavailable=_MISSING,
)
def csr_transpose(crow: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    csr = csr_of(crow, col, n)
    crow_t = crow.new_empty(n + 1)
    col_t, permutation = torch.empty_like(col), torch.empty_like(col)
    _C.csr_transpose(csr, crow_t.data_ptr(), col_t.data_ptr(), permutation.data_ptr())
    return crow_t, col_t, permutation
