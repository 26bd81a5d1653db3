"""What a kernel is, and what it is chosen by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from rosa_kernels.tile_plan import PlanSizes

AUTO = "auto"
# Like "auto", with the promise that dense operands hold neither Inf nor NaN.
AUTO_FINITE = "auto-finite"


class Call(NamedTuple):
    """What a kernel is chosen by: all of it is known without reading a device's memory.

    Attributes:
        device_type: of the device.
        dtype: of the dense operands.
        shape: sddmm (m, k, n), spmm (m, n, k), the others (m, n).
        device: its index; or the name of a machine, to plan for one that is not here.
        nnz: of the pattern; None where nobody asks.
        plan: sizes of the pattern's tile plan, where there is one.
        values_dtype: of sddmm's result and spmm's values.
        in_place: for each dense operand, whether kernels can read rows of it as they lie:
            contiguous, aligned to 16 bytes, as long as whole vectors.
        exact: whether torch's own GEMM keeps to float32 arithmetic under its present settings.
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
        stages: seconds by stage, in the order they run.
        uncertainty: how much longer, relatively, it may well take.
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
        op: the op it implements, e.g. "sddmm".
        backend: who provides it: "reference", "cpu", ...
        variant: which of the backend's implementations, e.g. "avx2"; None where there is one.
        run: the adapter, called with the flat arguments of the op.
        devices, dtypes: what it serves.
        priority: higher wins in automatic choice, where times are not predicted.
        availability: why this build or machine cannot run it at all, or None; or a function that
            finds out, where finding out initialises a driver. Read it as `unavailable`.
        reject: a function that gives the reason it cannot serve a call, or None. It may depend on
            the call alone: choices are remembered.
        cost: a function that predicts the time of a call, or gives None where it cannot.
        reads_plan: types of devices on which it wants the pattern's tile plan. Where there are any,
            `run` takes the plan's tensors, or an empty list, as one more argument.
        finite_only: Inf and NaN in a dense operand reach results that do not depend on them. Taken
            by name, or by "auto-finite".
        on_request: never an automatic choice.
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
        """What to ask for it by: "backend" or "backend/variant"."""
        return self.backend if self.variant is None else f"{self.backend}/{self.variant}"

    @cached_property
    def unavailable(self) -> str | None:
        """Why this build or machine cannot run it at all, or None."""
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
        """Whether asking for `backend` may mean this kernel."""
        return backend in (AUTO, AUTO_FINITE, self.backend, self.name)

    def reason(
        self, call: Call, backend: str = AUTO_FINITE, *, anywhere: bool = False
    ) -> str | None:
        """Why it cannot serve `call` when asked for by `backend`, or None if it can.

        `anywhere`: what this build and machine lack does not count.
        """
        reason = self.fixed_reason(call, backend, anywhere=anywhere)
        return reason if reason is not None or self.reject is None else self.reject(call)

    def fixed_reason(self, call: Call, backend: str, *, anywhere: bool = False) -> str | None:
        """The part of the reason that all calls of this device type and dtype share."""
        if call.device_type not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} tensors, got {call.device_type}"
        if call.dtype not in self.dtypes:
            names = ", ".join(sorted(_short(d) for d in self.dtypes))
            return f"takes dtypes {names}, got {_short(call.dtype)}"
        if self.on_request and backend in (AUTO, AUTO_FINITE):
            return "runs by request only"
        if self.finite_only and backend not in (AUTO_FINITE, self.name):
            return f"needs operands without Inf and NaN: ask for {self.name!r} or {AUTO_FINITE!r}"
        return None if anywhere else self.unavailable


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
