"""The choice of the kernel that serves a call, and the reasons why others cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosa_kernels import registry
from rosa_kernels.kernel import AUTO, Call, Estimate, Kernel

# At most this many choices are remembered: about 2 MB. Each new number of tokens can add one.
_MOST_CHOSEN = 4096


class Candidate(NamedTuple):
    """A kernel, with the reason why it cannot serve a call or with its predicted time.

    Attributes:
        kernel: the kernel.
        reason: why the kernel cannot serve the call, or None if it can.
        estimate: the predicted time, or None if the kernel cannot serve or its time is not
            predicted.
    """

    kernel: Kernel
    reason: str | None
    estimate: Estimate | None


def gemm_is_exact(device: str, dtype: torch.dtype) -> bool:
    """Whether torch.mm computes in full float32 under torch's current settings.

    On CUDA, the setting for `dtype` decides: TF32 for float32, float16 sums for float16. On a CPU,
    the setting for float32 decides for every dtype.
    """
    if device == "cuda":
        matmul = torch.backends.cuda.matmul
        if dtype == torch.float16:
            return not matmul.allow_fp16_accumulation
        return dtype != torch.float32 or matmul.fp32_precision != "tf32"
    mkldnn: Any = torch.backends.mkldnn  # Any: its type stub lacks matmul
    return mkldnn.matmul.fp32_precision in ("none", "ieee")


def candidates(
    op: str, call: Call, backend: str = AUTO, *, anywhere: bool = False
) -> list[Candidate]:
    """All kernels that `backend` may name, by descending priority.

    If `anywhere`, a kernel that this build or machine lacks counts as available.
    """
    found = []
    for kernel in registry.kernels(op):
        if kernel.named_by(backend):
            reason = kernel.reason(call, backend, anywhere=anywhere)
            estimate = kernel.cost(call) if reason is None and kernel.cost is not None else None
            found.append(Candidate(kernel, reason, estimate))
    return found


def choose_fastest(found: list[Candidate]) -> Candidate | None:
    """The candidate to run, or None if none can serve.

    The serving candidate of highest priority is taken if its time is not predicted. Otherwise the
    candidates with a predicted time compete, and the shortest time at worst wins.

    A dense product runs at its measured rate on every mask. A sparse kernel's time depends on the
    mask in ways that a model may miss. So near ties go to the dense product, which any user could
    have called.
    """
    serving = [candidate for candidate in found if candidate.reason is None]
    if not serving or serving[0].estimate is None:
        return serving[0] if serving else None
    return min(
        (c for c in serving if c.estimate is not None),
        key=lambda c: c.estimate.at_worst,  # type: ignore[union-attr]
    )


def cached_kernel(op: str, device_type: str, dtype: torch.dtype, backend: str) -> Kernel | None:
    """The kernel for all calls of this device type and dtype, or None if none is known."""
    return registry.chosen.get((op, backend, device_type, dtype))


def select(op: str, call: Call, backend: str = AUTO) -> Kernel:
    """The best kernel that serves `call`, among those that `backend` may name.

    The device must be present. For a machine that is only named, use :func:`candidates`.

    Raises:
        RuntimeError: no kernel can serve. The message gives every candidate's reason.
    """
    kernel = cached_kernel(op, call.device_type, call.dtype, backend)
    if kernel is not None:
        return kernel
    key = (op, backend, call)
    kernel = registry.chosen.get(key)
    if kernel is None:
        found = candidates(op, call, backend)
        best = choose_fastest(found)
        if best is None:
            detail = "; ".join(f"{c.kernel.name} {c.reason}" for c in found)
            who = "a kernel" if backend == AUTO else f"backend {backend!r}, asked for explicitly,"
            raise RuntimeError(
                f"{op}: expected {who} to serve this call, got none that can: "
                f"{detail or 'it has no such op'}"
            )
        kernel = best.kernel
        if len(registry.chosen) >= _MOST_CHOSEN:
            registry.chosen.clear()
        if _holds_for_all(kernel, found, call, backend):
            registry.chosen[op, backend, call.device_type, call.dtype] = kernel
        else:
            registry.chosen[key] = kernel
    return kernel


def kernel_on_matrix(op: str, w: Tensor, backend: str = AUTO) -> Kernel:
    """The kernel for an op that reads or writes a dense matrix only at the pattern's nonzeros.

    Raises:
        RuntimeError: no kernel can serve.
    """
    kernel = cached_kernel(op, w.device.type, w.dtype, backend)
    if kernel is None:
        kernel = select(op, Call(w.device.type, w.dtype, tuple(w.shape), w.get_device()), backend)
    return kernel


def _holds_for_all(kernel: Kernel, found: list[Candidate], call: Call, backend: str) -> bool:
    """Whether `kernel` would be chosen for every call of this device type and dtype."""
    for candidate in found:
        other = candidate.kernel
        if other.fixed_reason(call, backend) is None:
            return other is kernel and other.reject is None and other.cost is None
    return False
