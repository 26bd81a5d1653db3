"""The Kernel class, and the Call by which a kernel is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from rosa_kernels.tile_plan import PlanSizes

AUTO = "auto"
# Like "auto", but the caller promises that dense operands hold neither Inf nor NaN.
AUTO_FINITE = "auto-finite"


class Call(NamedTuple):
    """The properties of a call by which its kernel is chosen.

    All of them are known without reading a device's memory.

    Attributes:
        device_type: the device's type, such as "cpu".
        dtype: dtype of the dense operands.
        shape: (m, k, n) for sddmm, (m, n, k) for spmm, (m, n) for the other ops.
        device: the device's index, or the name of a machine that is not present, to plan for it.
        nnz: the pattern's number of nonzeros, or None if no kernel needs it.
        plan: the sizes of the pattern's tile plan, or None if there is none.
        values_dtype: dtype of sddmm's result or of spmm's values.
        in_place: for each dense operand, whether kernels can read its rows without a copy. Such
            rows are contiguous, aligned to 16 bytes and a multiple of 16 bytes long.
        exact: whether torch's GEMM computes in full float32 under its current settings.
    """

    device_type: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: int | str | None = None
    nnz: int | None = None
    plan: PlanSizes | None = None
    values_dtype: torch.dtype | None = None
    in_place: tuple[bool, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class Estimate:
    """A predicted time.

    Attributes:
        stages: seconds of each stage, in the order in which the stages run.
        uncertainty: how much longer than predicted the call may take, as a share: 0.1 is 10 %.
    """

    stages: dict[str, float]
    uncertainty: float

    @property
    def seconds(self) -> float:
        """The sum of the stages."""
        return sum(self.stages.values())

    @property
    def at_worst(self) -> float:
        """The upper end of the uncertainty."""
        return self.seconds * (1 + self.uncertainty)


@dataclass(frozen=True, repr=False)
class Kernel:
    """One implementation of one op.

    Attributes:
        op: the op that the kernel implements, such as "sddmm".
        backend: the backend that provides the kernel, such as "reference" or "cpu".
        variant: one of the backend's implementations, such as "avx2". None if there is only one.
        run: the adapter, called with the flat arguments of the op.
        devices, dtypes: the device types and dtypes that the kernel serves.
        priority: the automatic choice takes the highest priority, unless it compares predicted
            times.
        availability: why this build or machine cannot run the kernel at all, or None. It is a
            function that returns this if finding out initialises a driver. Read it as
            `unavailable`.
        reject: a function that returns why the kernel cannot serve a call, or None. It may depend
            only on the call, because choices are remembered.
        cost: a function that predicts the time of a call, or returns None if it cannot.
        reads_plan: device types on which the kernel uses the pattern's tile plan. If there are any,
            `run` takes the plan's tensors, or an empty list, as one more argument.
        finite_only: whether Inf and NaN in a dense operand reach results that do not depend on
            them. Such a kernel is taken only by its full name or by "auto-finite".
        on_request: whether the kernel is never chosen automatically.
    """

    op: str
    backend: str
    variant: str | None
    run: Callable[..., Any]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    priority: int
    availability: str | Callable[[], str | None] | None = None
    reject: Callable[[Call], str | None] | None = None
    cost: Callable[[Call], Estimate | None] | None = None
    reads_plan: frozenset[str] = frozenset()
    finite_only: bool = False
    on_request: bool = False

    @property
    def name(self) -> str:
        """The kernel's full name: "backend" or "backend/variant"."""
        return self.backend if self.variant is None else f"{self.backend}/{self.variant}"

    @cached_property
    def unavailable(self) -> str | None:
        """Why this build or machine cannot run the kernel at all, or None."""
        return self.availability() if callable(self.availability) else self.availability

    def __repr__(self) -> str:
        parts = [
            f"{self.op} {self.name!r}",
            f"devices={sorted(self.devices)}",
            f"dtypes={sorted(_short(d) for d in self.dtypes)}",
            f"priority={self.priority}",
        ]
        if self.finite_only:
            parts.append("finite_only")
        if self.unavailable is not None:
            parts.append(f"unavailable={self.unavailable!r}")
        return f"Kernel({', '.join(parts)})"

    def named_by(self, backend: str) -> bool:
        """Whether a request for `backend` may name this kernel."""
        return backend in (AUTO, AUTO_FINITE, self.backend, self.name)

    def reason(
        self, call: Call, backend: str = AUTO_FINITE, *, anywhere: bool = False
    ) -> str | None:
        """Why the kernel cannot serve `call` if `backend` is requested, or None if it can.

        If `anywhere`, the kernel counts as available in this build and on this machine.
        """
        reason = self.fixed_reason(call, backend, anywhere=anywhere)
        return reason if reason is not None or self.reject is None else self.reject(call)

    def fixed_reason(self, call: Call, backend: str, *, anywhere: bool = False) -> str | None:
        """The part of :meth:`reason` that all calls of this device type and dtype share."""
        if call.device_type not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} tensors, got {call.device_type}"
        if call.dtype not in self.dtypes:
            names = ", ".join(sorted(_short(d) for d in self.dtypes))
            return f"takes dtypes {names}, got {_short(call.dtype)}"
        if self.on_request and backend in (AUTO, AUTO_FINITE):
            return "runs only if its backend is requested"
        if self.finite_only and backend not in (AUTO_FINITE, self.name):
            return f"needs operands without Inf and NaN: ask for {self.name!r} or {AUTO_FINITE!r}"
        return None if anywhere else self.unavailable


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
