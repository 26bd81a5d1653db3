"""explain: find which kernel would serve a call and why, without running the call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rosa_kernels import choice, registry
from rosa_kernels.backends.machine import MACHINES, Machine, machine_of
from rosa_kernels.choice import Candidate
from rosa_kernels.kernel import Call, Kernel
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.tile_plan import HEAVY_FILL, PlanSizes, default_tile

# csr_add runs csr_add_ on a clone, so it has the same kernels.
_KERNELS_OF = {"csr_add": "csr_add_"}
_PRODUCTS = ("sddmm", "spmm")
_LAYOUTS = ("token-major", "row-major")


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`. Printing it gives a table.

    Attributes:
        op: the op.
        call: the call, as kernels are chosen by it.
        where: the name of the device or machine.
        candidates: every kernel that the backend may name. Each has the reason why it cannot serve
            or, on CUDA, its predicted time by stage.
        chosen: the kernel that would serve the call, or None.
        why: the reason for the choice.
    """

    op: str
    call: Call
    where: str
    candidates: tuple[Candidate, ...]
    chosen: Kernel | None
    why: str

    def __str__(self) -> str:
        stages: dict[str, None] = {}
        for _, _, estimate in self.candidates:
            stages.update(dict.fromkeys(estimate.stages if estimate else ()))
        numbers = ["predicted", "at worst", *stages] if stages else []
        rows = [["", "kernel", *numbers, ""]]
        for kernel, reason, estimate in sorted(self.candidates, key=_order):
            times: list[float | None] = [None] * len(numbers)
            if estimate is not None:
                times = [estimate.seconds, estimate.at_worst]
                times += [estimate.stages.get(stage) for stage in stages]
            mark = "*" if kernel is self.chosen else ""
            rows.append([mark, kernel.name, *map(_time, times), reason or ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for mark, name, *cells, reason in rows:
            padded = [mark.ljust(widths[0]), name.ljust(widths[1])]
            padded += [cell.rjust(w) for cell, w in zip(cells, widths[2:-1], strict=True)]
            lines.append("  ".join([*padded, reason]).rstrip())
        return "\n".join([self._title(), *lines, self.why])

    def _title(self) -> str:
        call = self.call
        shape = " x ".join(str(size) for size in call.shape)
        dtype = str(call.dtype).removeprefix("torch.")
        title = f"{self.op} {shape}, nnz {call.nnz}, {dtype}, on {self.where}"
        if call.plan is not None:
            p = call.plan
            title += (
                f"\n{p.tiles} heavy tiles of {p.tile_rows} x {p.tile_cols} with "
                f"{p.heavy_nnz / max(p.nnz, 1):.1%} of nnz"
            )
        return title


def _order(candidate: Candidate) -> tuple[bool, float]:
    """Sort key: predicted times in ascending order, then other serving kernels, then the rest."""
    _, reason, estimate = candidate
    return reason is not None, estimate.at_worst if estimate else math.inf


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def explain(
    op: str,
    pattern: CsrPattern,
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
    layout: str = "token-major",
    values_dtype: torch.dtype | None = None,
) -> Explanation:
    """Find which kernel would serve a call, and why. Print the result for a table.

    Args:
        op: "sddmm", "spmm", "csr_add", "csr_add_", "csr_gather" or "csr_scatter_".
        pattern: the sparsity pattern. If a kernel needs a tile plan and the pattern has no fitting
            one, a plan is built and not kept.
        k: number of tokens, for "sddmm" and "spmm".
        dtype: dtype of the dense operands.
        device: the tensors' device, by default the pattern's. It may be the name of a GPU that is
            not present: "H200", "H100" or "A100". All kernels then count as available.
        backend: a backend's name, as the ops take it.
        layout: layout of the dense operands, "token-major" or "row-major".
        values_dtype: dtype of sddmm's result or of spmm's values, by default `dtype`.

    Raises:
        ValueError: the op, layout, device or backend is unknown, or a product has no k >= 0.
        RuntimeError: `device` is a CUDA device, and CUDA is not available here.
    """
    if op in _PRODUCTS and (k is None or k < 0):
        raise ValueError(f"explain: expected a number of tokens k for {op}, got {k}")
    if layout not in _LAYOUTS:
        raise ValueError(f"explain: expected a layout among {_LAYOUTS}, got {layout!r}")
    kernels_of = _KERNELS_OF.get(op, op)
    backend = registry.requested(backend)
    kind, place, machine = _place_of(pattern.device if device is None else device)
    m, n = pattern.shape
    tokens = k or 0
    shape = {"sddmm": (m, tokens, n), "spmm": (m, n, tokens)}.get(op, (m, n))
    in_place = layout == "row-major" and tokens * dtype.itemsize % 16 == 0
    call = Call(
        kind,
        dtype,
        shape,
        device=place,
        nnz=pattern.nnz,
        plan=_plan_sizes(kernels_of, pattern, kind, machine, backend),
        values_dtype=values_dtype or dtype,
        in_place=(in_place,) * {"sddmm": 2, "spmm": 1}.get(op, 0),
        exact=choice.gemm_is_exact(kind, dtype),
    )
    elsewhere = isinstance(place, str)  # then this build and machine do not matter
    found = choice.candidates(kernels_of, call, backend, anywhere=elsewhere)
    best = choice.choose_fastest(found)
    where = machine.name if machine else kind
    if machine and not machine.calibrated:
        where += " (rates partly estimated)"
    if best is None:
        chosen, why = None, f"no kernel can serve this call on backend {backend!r}"
    elif best.estimate is None:
        chosen, why = best.kernel, f"{best.kernel.name}: the first by priority that can serve"
    else:
        chosen = best.kernel
        why = f"{chosen.name}: the shortest time at worst, {_time(best.estimate.at_worst)}"
    return Explanation(op, call, where, tuple(found), chosen, why)


def _place_of(device: torch.device | str) -> tuple[str, int | str | None, Machine | None]:
    """The device's type, its index or the machine's name, and the machine with its rates."""
    if isinstance(device, str) and device in MACHINES:
        return "cuda", device, machine_of(device)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"explain: expected a device or one of {', '.join(MACHINES)}, got {device!r}"
        ) from error
    if device.type != "cuda":
        return device.type, None, None
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"explain: expected a CUDA device here, got none; name one of {', '.join(MACHINES)} to "
            "plan for it"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return "cuda", index, machine_of(index)


def _plan_sizes(
    op: str, pattern: CsrPattern, kind: str, machine: Machine | None, backend: str
) -> PlanSizes | None:
    """The sizes of the tile plan that the op would give its kernel, or None if none reads it.

    The op takes the pattern's plan if it has a fitting one, or builds one.
    """
    if not registry.reads_plan(op, kind, backend):
        return None
    tile = machine.tile if machine else default_tile(torch.device(kind))
    if pattern.has_tile_plan and (pattern.device.type == kind or pattern.tile_plan.tile == tile):
        return pattern.tile_plan.sizes
    return pattern.make_tile_plan(*tile, HEAVY_FILL).sizes
