"""The native backend "cuda": checked adapters between tensors and the CUDA functions of ``_C``.

They also adapt the tests' module of emulated kernels, whose device memory is CPU memory.

An adapter allocates scratch memory through torch. So scratch is pooled, ordered by stream and
captured in graphs, and torch raises its own error if memory runs out. An adapter launches on the
current stream of the tensors' device and never waits. It keeps nothing between calls, so any number
of threads may call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.backends import cost
from rosa_kernels.backends.machine import machine_of
from rosa_kernels.backends.native import (
    MISSING,
    MODULE,
    address,
    check_operands,
    csr_of,
    csr_of_w,
    dtype_code,
    matrix_of,
    vector_of,
)
from rosa_kernels.kernel import Call
from rosa_kernels.registry import register
from rosa_kernels.strides import empty_like_order
from rosa_kernels.tile_plan import HEADER

_ANY = {torch.float32, torch.bfloat16, torch.float16}
_NARROW = {torch.bfloat16, torch.float16}
_SDDMM = {"gather": 0, "tile": 1, "wgmma": 2}
_SPMM = {"gather": 0, "tile": 1}
# The tiles for which each variant is built, or None for a variant without tiles.
_TILES = {"gather": None, "tile": {(128, 128), (128, 256)}, "wgmma": {(128, 256)}}
_PRIORITY = {"gather": 100, "tile": 101, "wgmma": 102}
_SDDMM_COST = {"gather": cost.sddmm_gather, "tile": cost.sddmm_tile, "wgmma": cost.sddmm_wgmma}
_SPMM_COST = {"gather": cost.spmm_gather, "tile": cost.spmm_tile}


def _place(x: Tensor, *others: Tensor) -> tuple[int, int]:
    """The index and the current stream of the device that all these tensors share."""
    index = x.get_device()
    for other in others:
        if other.get_device() != index:
            raise ValueError(f"expected one device, got {x.device} and {other.device}")
    if index < 0:  # emulated
        return 0, 0
    return index, torch._C._cuda_getCurrentRawStream(index)


def _plan_of(plan: Sequence[Tensor], col: Tensor) -> tuple[int, ...]:
    """The checked addresses and sizes of a tile plan, or () for none."""
    if not plan:
        return ()
    header, blob = plan
    if not (
        header.dtype is torch.int64
        and header.is_cpu
        and header.is_contiguous()
        and header.shape == (HEADER,)
    ):
        raise ValueError(
            f"expected the header of a tile plan as {HEADER} contiguous int64 on the CPU, got "
            f"{tuple(header.shape)} of {header.dtype} on {header.device}"
        )
    if not (
        blob.dtype is torch.int32
        and blob.dim() == 1
        and blob.is_contiguous()
        and blob.get_device() == col.get_device()
    ):
        raise ValueError(
            f"expected the blob of a tile plan as contiguous int32 on {col.device}, got "
            f"{tuple(blob.shape)} of {blob.dtype} on {blob.device}"
        )
    return address(header), HEADER, address(blob), blob.shape[0]


def cuda_workspace_bytes(
    op: str,
    variant: str,
    crow: Tensor,
    col: Tensor,
    operands: Sequence[Tensor],
    plan: Sequence[Tensor] = (),
    module: Any = MODULE,
) -> int:
    """Bytes of scratch memory that an op allocates beside its result.

    The operands are a and b for sddmm, and b for spmm.
    """
    b = operands[-1]
    csr = csr_of(crow, col, b.shape[0])
    index, _ = _place(b, col)
    pack = _plan_of(plan, col)
    if op == "sddmm":
        a, b = operands
        return module.cuda_sddmm_workspace_bytes(
            _SDDMM[variant], csr, pack, matrix_of(a), matrix_of(b), index
        )
    # Only the strides of c matter, and they follow those of b.
    like = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype, device="meta")
    c = empty_like_order(like, csr[2])
    without_memory = 0, dtype_code(c), *c.shape, *c.stride()
    return module.cuda_spmm_workspace_bytes(
        _SPMM[variant], csr, pack, matrix_of(b), without_memory, index
    )


def _sddmm(module: Any, variant: str) -> Callable[..., Tensor]:
    code = _SDDMM[variant]

    def run(
        crow: Tensor,
        col: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: torch.dtype,
        plan: Sequence[Tensor] = (),
    ) -> Tensor:
        csr = csr_of(crow, col, b.shape[0])
        check_operands(csr, a, b)
        index, stream = _place(col, crow, a, b)
        with_plan, va, vb = _plan_of(plan, col), matrix_of(a), matrix_of(b)
        scratch = module.cuda_sddmm_workspace_bytes(code, csr, with_plan, va, vb, index)
        work = col.new_empty(scratch, dtype=torch.uint8)
        out = a.new_empty(csr[4], dtype=out_dtype)
        to = vector_of(out, csr[4])
        module.cuda_sddmm(code, csr, with_plan, va, vb, to, address(work), index, stream)
        return out

    return run


def _spmm(module: Any, variant: str) -> Callable[..., Tensor]:
    code = _SPMM[variant]

    def run(
        crow: Tensor, col: Tensor, values: Tensor, b: Tensor, plan: Sequence[Tensor] = ()
    ) -> Tensor:
        csr = csr_of(crow, col, b.shape[0])
        index, stream = _place(col, crow, values, b)
        c = empty_like_order(b, csr[2])
        with_plan, vb, vc = _plan_of(plan, col), matrix_of(b), matrix_of(c)
        scratch = module.cuda_spmm_workspace_bytes(code, csr, with_plan, vb, vc, index)
        work = col.new_empty(scratch, dtype=torch.uint8)
        v = vector_of(values, csr[4])
        module.cuda_spmm(code, csr, with_plan, v, vb, vc, address(work), index, stream)
        return c

    return run


def _csr_add_(module: Any) -> Callable[..., None]:
    def run(w: Tensor, crow: Tensor, col: Tensor, values: Tensor, alpha: float) -> None:
        csr = csr_of_w(w, crow, col)
        index, stream = _place(col, crow, w, values)
        v = vector_of(values, csr[4])
        module.cuda_csr_add_(matrix_of(w), csr, v, alpha, index, stream)

    return run


def _csr_gather(module: Any) -> Callable[..., Tensor]:
    def run(w: Tensor, crow: Tensor, col: Tensor) -> Tensor:
        csr = csr_of_w(w, crow, col)
        index, stream = _place(col, crow, w)
        out = w.new_empty(csr[4])
        module.cuda_csr_gather(matrix_of(w), csr, vector_of(out, csr[4]), index, stream)
        return out

    return run


def _csr_scatter_(module: Any) -> Callable[..., None]:
    def run(w: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> None:
        csr = csr_of_w(w, crow, col)
        index, stream = _place(col, crow, w, values)
        module.cuda_csr_scatter_(matrix_of(w), csr, vector_of(values, csr[4]), index, stream)

    return run


def _slab(module_entry: Callable[..., None]) -> Callable[..., None]:
    """csr_gather or csr_scatter_ between `values` and `w`, a slab of the whole matrix's rows.

    `crow` is the slab's part of the pattern's row pointers, and begins at `first`. `col` is the
    whole pattern's.
    """

    def run(w: Tensor, crow: Tensor, col: Tensor, first: int, values: Tensor) -> None:
        nnz = values.shape[0]
        csr = csr_of_w(w, crow, col)
        if not 0 <= first <= first + nnz <= csr[4]:
            raise ValueError(f"expected entries among {csr[4]}, got {nnz} from {first}")
        index, stream = _place(col, crow, w, values)
        module_entry(matrix_of(w), (*csr[:4], nnz), vector_of(values, nnz), index, stream)

    return run


def _rejects(module: Any, op: str, variant: str | None) -> Callable[[Call], str | None]:
    """A function that returns why a call cannot be served, or None.

    The reason is the device, this build or the tile plan.
    """

    @lru_cache(maxsize=64)
    def device(index: int) -> str | None:
        reason = module.cuda_unsupported(index)
        if reason or variant != "wgmma":
            return reason or None
        _, major, minor, *_ = module.cuda_properties(index)
        if (major, minor) != (9, 0):
            return f"runs only on compute capability 9.0, got {major}.{minor}"
        if not module.cuda_has_wgmma():
            return "was not built for compute capability 9.0"
        return None

    @lru_cache(maxsize=64)
    def room(index: int, variant: str, tile_cols: int) -> str | None:
        if op == "sddmm":
            needed = module.cuda_sddmm_shared_bytes(_SDDMM[variant], tile_cols, index)
        else:
            needed = module.cuda_spmm_shared_bytes(_SPMM[variant])
        *_, there = module.cuda_properties(index)
        if needed <= there:
            return None
        return (
            f"needs {needed} bytes of shared memory a block for tiles {tile_cols} wide, got a "
            f"device with {there}"
        )

    def reject(call: Call) -> str | None:
        if isinstance(call.device, str):
            major, minor = machine_of(call.device).capability
            if variant == "wgmma" and (major, minor) != (9, 0):
                return f"runs only on compute capability 9.0, got {major}.{minor}"
        elif call.device is not None:
            reason = device(max(call.device, 0))
            if reason is not None:
                return reason
        if variant is None:
            return None
        tiles = _TILES[variant]
        if tiles is None:
            return None
        if op == "spmm" and call.values_dtype not in (None, call.dtype):
            return f"takes values of b's dtype {call.dtype}, got {call.values_dtype}"
        if call.plan is None:
            return (
                "needs the pattern's tile plan, which torch.compile and graph capture do not "
                "build: touch pattern.tile_plan before"
            )
        got = call.plan.tile_rows, call.plan.tile_cols
        if got not in tiles:
            names = " or ".join(f"{r} x {c}" for r, c in sorted(tiles))
            return f"needs a plan of {names} tiles, got {got[0]} x {got[1]}"
        # A GPU that is only named cannot be asked. All such GPUs have enough shared memory.
        if not isinstance(call.device, int):
            return None
        return room(max(call.device, 0), variant, got[1])

    return reject


def register_cuda_kernels(
    module: Any,
    backend: str = "cuda",
    device: str = "cuda",
    unavailable: str | Callable[[], str | None] | None = None,
    *,
    on_request: bool = False,
) -> None:
    """Register the kernels of a native module under a backend's name.

    Args:
        module: a module with the functions cuda_* of ``_C``.
        backend: the backend's name.
        device: the type of device whose tensors the kernels take.
        unavailable: why the kernels cannot run, or None. It may be a function that returns this.
        on_request: whether the kernels are never chosen automatically.
    """

    def add(op: str, variant: str | None, run: Callable[..., Any], **options: Any) -> None:
        common: dict[str, Any] = {
            "variant": variant,
            "devices": {device},
            "dtypes": _ANY,
            "priority": _PRIORITY[variant or "gather"],
            "unavailable": unavailable,
            "reject": _rejects(module, op, variant),
            "on_request": on_request,
        }
        register(op, backend, **{**common, **options})(run)

    def products(op: str, adapter: Callable[..., Any], costs: Mapping[str, cost.Model]) -> None:
        for variant, model in costs.items():
            tiles = variant != "gather"
            options: dict[str, Any] = {"cost": model, "reads_plan": {device}}
            if tiles:
                options["dtypes"] = _NARROW
            if tiles and op == "spmm":  # a tile's zeros are multiplied too
                options["finite_only"] = True
            add(op, variant, adapter(module, variant), **options)

    products("sddmm", _sddmm, _SDDMM_COST)
    products("spmm", _spmm, _SPMM_COST)
    add("csr_add_", None, _csr_add_(module))
    add("csr_gather", None, _csr_gather(module))
    add("csr_scatter_", None, _csr_scatter_(module))
    if module is not None and hasattr(module, "cuda_csr_gather"):
        add("csr_gather_slab", None, _slab(module.cuda_csr_gather))
        add("csr_scatter_slab_", None, _slab(module.cuda_csr_scatter_))


def _unavailable() -> str | None:
    if MISSING is not None:
        return MISSING
    if not hasattr(MODULE, "cuda_sddmm"):
        return "is not built: CMake found no CUDA compiler (nvcc) for this build"
    if torch.version.cuda is None:
        return f"needs a torch with CUDA, got {torch.__version__}"
    return MODULE.cuda_unavailable() or None


register_cuda_kernels(MODULE, unavailable=_unavailable)
