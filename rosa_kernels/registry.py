"""One registry: which kernels exist, which can serve a call, and why the others cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch

from rosa_kernels.tile_plan import PlanSizes

_Function = TypeVar("_Function", bound=Callable[..., Any])

AUTO = "auto"
# Like "auto", with the promise that dense operands hold neither Inf nor NaN.
AUTO_FINITE = "auto-finite"
# Choices remembered. Where token counts keep changing, 4096 of them are about 2 MB.
_MOST_SELECTED = 4096


class Call(NamedTuple):
    """What a kernel is chosen by: all of it is known without reading a device's memory.

    Attributes:
        device: the type of the device.
        dtype: of the dense operands.
        shape: sddmm (m, k, n), spmm (m, n, k), the others (m, n).
        place: index of the device; or the name of a machine, to plan for one that is not here.
        nnz: of the pattern; None where nobody asks.
        plan: sizes of the pattern's tile plan, where there is one.
        other: dtype of sddmm's result and spmm's values.
        in_place: for each dense operand, whether kernels can read rows of it as they lie:
            contiguous, aligned to 16 bytes, as long as whole vectors.
        exact: whether torch's own GEMM keeps to float32 arithmetic under its present settings.
    """

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: int | str | None = None
    nnz: int | None = None
    plan: PlanSizes | None = None
    other: torch.dtype | None = None
    in_place: tuple[bool, ...] = ()
    exact: bool = True

    @property
    def elsewhere(self) -> bool:
        """Whether it is planned for a machine that is not this one."""
        return isinstance(self.place, str)


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

    def reason(self, call: Call, backend: str = AUTO_FINITE) -> str | None:
        """Why it cannot serve `call` when asked for by `backend`, or None if it can."""
        reason = self._fixed_reason(call, backend)
        return reason if reason is not None or self.reject is None else self.reject(call)

    def _fixed_reason(self, call: Call, backend: str) -> str | None:
        """The part of the reason that all calls of this device type and dtype share."""
        if call.device not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} tensors, got {call.device}"
        if call.dtype not in self.dtypes:
            names = ", ".join(sorted(_short(d) for d in self.dtypes))
            return f"takes dtypes {names}, got {_short(call.dtype)}"
        if self.on_request and backend in (AUTO, AUTO_FINITE):
            return "runs by request only"
        if self.finite_only and backend not in (AUTO_FINITE, self.name):
            return f"needs operands without Inf and NaN: ask for {self.name!r} or {AUTO_FINITE!r}"
        # What this machine lacks says nothing about another one.
        return None if call.elsewhere else self.unavailable


class Candidate(NamedTuple):
    """A kernel in a choice: why it cannot serve, or else the time predicted where it is."""

    kernel: Kernel
    reason: str | None
    estimate: Estimate | None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_kernels: dict[str, list[Kernel]] = {}
_requested: ContextVar[str | None] = ContextVar("rosa_backend", default=None)
# By (op, backend, device type, dtype) where the choice holds for all such calls, else by (op,
# backend, call).
_selected: dict[tuple[Any, ...], Kernel] = {}
_plan_readers: dict[tuple[str, str, str], bool] = {}
_known_backends: set[str] = set()


def register(
    op: str,
    backend: str,
    *,
    variant: str | None = None,
    devices: set[str],
    dtypes: set[torch.dtype],
    priority: int,
    unavailable: str | Callable[[], str | None] | None = None,
    reject: Callable[[Call], str | None] | None = None,
    cost: Callable[[Call], Estimate | None] | None = None,
    reads_plan: set[str] | None = None,
    finite_only: bool = False,
    on_request: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function an implementation of `op`, tested and timed with all others.

    The arguments are the attributes of :class:`Kernel`; `unavailable` may be a function.
    """

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        kernel = Kernel(
            op,
            backend,
            variant,
            run,
            frozenset(devices),
            frozenset(dtypes),
            priority,
            unavailable,
            reject,
            cost,
            frozenset(reads_plan or ()),
            finite_only,
            on_request,
        )
        if any(k.name == kernel.name for k in _kernels.get(op, [])):
            raise ValueError(f"register: expected a new kernel name for {op}, got {kernel.name!r}")
        _kernels.setdefault(op, []).append(kernel)
        _kernels[op].sort(key=lambda k: -k.priority)
        _forget_choices()
        return run

    return add


@contextmanager
def withheld(names: Iterable[str]) -> Iterator[None]:
    """Within it these kernels serve by name alone, in every thread: their results are in doubt."""
    before = dict(_kernels)
    unwanted = set(names)
    for op, known in before.items():
        _kernels[op] = [replace(k, on_request=True) if k.name in unwanted else k for k in known]
    _forget_choices()
    try:
        yield
    finally:
        _kernels.update(before)
        _forget_choices()


def _forget_choices() -> None:
    _selected.clear()
    _plan_readers.clear()


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """All registered kernels of `op` (of every op if None), best first."""
    if op is None:
        return tuple(k for op_kernels in _kernels.values() for k in op_kernels)
    if op not in _kernels:
        raise ValueError(f"kernels: expected an op among {sorted(_kernels)}, got {op!r}")
    return tuple(_kernels[op])


def backend_names() -> list[str]:
    """Every name that `backend=`, `use_backend` and ROSA_BACKEND understand."""
    names = {AUTO, AUTO_FINITE}
    for kernel in kernels():
        names |= {kernel.backend, kernel.name}
    return sorted(names)


def check_backend(name: str) -> str:
    """`name` if it is one of :func:`backend_names`; else ValueError that lists them."""
    if name not in _known_backends:  # listing them costs 10 us
        names = backend_names()
        if name not in names:
            raise ValueError(f"expected a backend among {', '.join(names)}, got {name!r}")
        _known_backends.add(name)
    return name


def _constant_when_traced(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does to a function.

    That imports torch._dynamo, which takes a second: nobody who does not compile should wait.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ops run on backend `name` ("cpu", "cpu/avx2", "reference", "auto", ...).

    An explicit request never falls back: an op that the backend cannot serve raises.

    Raises:
        ValueError: no such backend; the message lists those there are.
    """
    token = _requested.set(check_backend(name))
    try:
        yield
    finally:
        _requested.reset(token)


@_constant_when_traced
def _ambient() -> str:
    name = _requested.get()
    if name is not None:
        return name
    name = os.environ.get("ROSA_BACKEND", "")
    return check_backend(name) if name else AUTO


def requested(backend: str | None) -> str:
    """The backend asked for: argument, else use_backend, else ROSA_BACKEND, else "auto".

    Code under ``torch.compile`` reads the last three once, when it is traced.
    """
    return _ambient() if backend is None else check_backend(backend)


def gemm_is_exact(device: str, dtype: torch.dtype) -> bool:
    """Whether torch.mm keeps float32 arithmetic for such operands, or for float32 on a CPU."""
    if device == "cuda":
        matmul = torch.backends.cuda.matmul
        if dtype == torch.float16:
            return not matmul.allow_fp16_accumulation
        return dtype != torch.float32 or matmul.fp32_precision != "tf32"
    mkldnn: Any = torch.backends.mkldnn  # whose stub has no matmul
    return mkldnn.matmul.fp32_precision in ("none", "ieee")


def related(op: str, backend: str) -> str:
    """Where `op` runs as part of the gradient of an op that was asked of `backend`.

    There too; but of a variant that `op` has not, or has for finite operands only (which were not
    promised of gradients), only its backend is left.
    """
    if "/" not in backend:
        return backend
    if any(kernel.name == backend and not kernel.finite_only for kernel in kernels(op)):
        return backend
    return backend.split("/", 1)[0]


@_constant_when_traced
def reads_plan(op: str, device: str, backend: str) -> bool:
    """Whether a kernel that `backend` may mean for `op` on such a device wants the tile plan."""
    key = (op, device, backend)
    answer = _plan_readers.get(key)
    if answer is None:
        answer = any(
            device in kernel.reads_plan and kernel.named_by(backend)
            for kernel in kernels(op)
            if not (kernel.on_request and backend in (AUTO, AUTO_FINITE))
        )
        _plan_readers[key] = answer
    return answer


def candidates(op: str, call: Call, backend: str = AUTO) -> list[Candidate]:
    """Every kernel that `backend` may mean, best first where times are not predicted."""
    found = []
    for kernel in kernels(op):
        if kernel.named_by(backend):
            reason = kernel.reason(call, backend)
            estimate = kernel.cost(call) if reason is None and kernel.cost is not None else None
            found.append(Candidate(kernel, reason, estimate))
    return found


def best_of(found: list[Candidate]) -> Candidate | None:
    """The one to take, or None if none can serve.

    The first that can serve, by priority. If its time is predicted, all whose time is compete, by
    the upper end of their uncertainty: a dense product runs as fast as measured on any mask, a
    sparse kernel's time depends on the mask in ways a model may miss. So near ties go to the dense
    one, and losing to it, which any user could have called, costs at most what is uncertain.
    """
    serving = [candidate for candidate in found if candidate.reason is None]
    if not serving or serving[0].estimate is None:
        return serving[0] if serving else None
    return min(
        (c for c in serving if c.estimate is not None),
        key=lambda c: c.estimate.at_worst,  # type: ignore[union-attr]
    )


def settled(op: str, device: str, dtype: torch.dtype, backend: str) -> Kernel | None:
    """The kernel for all calls of this device type and dtype, if it is known and is one for all."""
    return _selected.get((op, backend, device, dtype))


def select(op: str, call: Call, backend: str = AUTO) -> Kernel:
    """The best kernel that serves `call`; with an explicit `backend`, one of that backend.

    Raises:
        RuntimeError: none can; the message gives every candidate's reason.
    """
    kernel = settled(op, call.device, call.dtype, backend)
    if kernel is not None:
        return kernel
    key = (op, backend, call)
    kernel = _selected.get(key)
    if kernel is None:
        found = candidates(op, call, backend)
        best = best_of(found)
        if best is None:
            detail = "; ".join(f"{c.kernel.name} {c.reason}" for c in found)
            who = "a kernel" if backend == AUTO else f"backend {backend!r}, asked for explicitly,"
            raise RuntimeError(
                f"{op}: expected {who} to serve this call, got none that can: "
                f"{detail or 'it has no such op'}"
            )
        kernel = best.kernel
        if len(_selected) >= _MOST_SELECTED:
            _selected.clear()
        if _holds_for_all(kernel, found, call, backend):
            _selected[op, backend, call.device, call.dtype] = kernel
        else:
            _selected[key] = kernel
    return kernel


def _holds_for_all(kernel: Kernel, found: list[Candidate], call: Call, backend: str) -> bool:
    """Whether `kernel` would be chosen for every call of this device type and dtype."""
    if call.elsewhere:
        return False
    for candidate in found:
        other = candidate.kernel
        if other._fixed_reason(call, backend) is None:
            return other is kernel and other.reject is None and other.cost is None
    return False
