"""One registry: which kernels exist, which can serve a call, and why the others cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

AUTO = "auto"


class Call(NamedTuple):
    """What a kernel is chosen by: all of it is known without reading a tensor's data."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    Attributes:
        op: the op it implements, e.g. "sddmm".
        backend: who provides it: "reference", "cpu", ...
        variant: which of the backend's implementations, e.g. "avx2"; None where there is one.
        run: the adapter, called with the flat arguments of the op.
        devices, dtypes: what it serves.
        priority: higher wins in automatic choice.
        unavailable: why this build or machine cannot run it at all, or None.
        reject: a function that gives the reason it cannot serve a call, or None.
    """

    op: str
    backend: str
    variant: str | None
    run: Callable[..., Any] = field(repr=False)
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    priority: int
    unavailable: str | None = None
    reject: Callable[[Call], str | None] | None = field(repr=False, default=None)

    @property
    def name(self) -> str:
        """What to ask for it by: "backend" or "backend/variant"."""
        return self.backend if self.variant is None else f"{self.backend}/{self.variant}"

    def reason(self, call: Call) -> str | None:
        """Why it cannot serve `call`, or None if it can."""
        if call.device not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} tensors, got {call.device}"
        if call.dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"takes dtypes {names}, got {str(call.dtype).removeprefix('torch.')}"
        if self.unavailable is not None:
            return self.unavailable
        return None if self.reject is None else self.reject(call)


_kernels: dict[str, list[Kernel]] = {}
_requested: ContextVar[str | None] = ContextVar("rosa_backend", default=None)
_selected: dict[tuple[str, str, str, torch.dtype], Kernel] = {}


def register(
    op: str,
    backend: str,
    *,
    variant: str | None = None,
    devices: set[str],
    dtypes: set[torch.dtype],
    priority: int,
    unavailable: str | None = None,
    reject: Callable[[Call], str | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function an implementation of `op`, tested and timed with all others."""

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
        )
        if any(k.name == kernel.name for k in _kernels.get(op, [])):
            raise ValueError(f"register: expected a new kernel name for {op}, got {kernel.name!r}")
        _kernels.setdefault(op, []).append(kernel)
        _kernels[op].sort(key=lambda k: -k.priority)
        _selected.clear()
        return run

    return add


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """All registered kernels of `op` (of every op if None), best first."""
    if op is None:
        return tuple(k for op_kernels in _kernels.values() for k in op_kernels)
    if op not in _kernels:
        raise ValueError(f"kernels: expected an op among {sorted(_kernels)}, got {op!r}")
    return tuple(_kernels[op])


def backend_names() -> list[str]:
    """Every name that `backend=`, `use_backend` and ROSA_BACKEND understand."""
    names = {AUTO}
    for kernel in kernels():
        names |= {kernel.backend, kernel.name}
    return sorted(names)


def check_backend(name: str) -> str:
    """`name` if it is one of :func:`backend_names`; else ValueError that lists them."""
    if name not in backend_names():
        raise ValueError(f"expected a backend among {', '.join(backend_names())}, got {name!r}")
    return name


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


@torch.compiler.assume_constant_result
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


def select(op: str, call: Call, backend: str = AUTO) -> Kernel:
    """The best kernel that serves `call`; with an explicit `backend`, one of that backend.

    Raises:
        RuntimeError: none can; the message gives every candidate's reason.
    """
    key = (op, backend, call.device, call.dtype)
    kernel = _selected.get(key)
    if kernel is not None:
        return kernel
    reasons = []
    cacheable = True
    for kernel in kernels(op):
        if backend not in (AUTO, kernel.backend, kernel.name):
            continue
        # What depends on more than the key must be asked again at the next call.
        cacheable = cacheable and kernel.reject is None
        reason = kernel.reason(call)
        if reason is None:
            if cacheable:
                _selected[key] = kernel
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    detail = "; ".join(reasons) if reasons else "it has no such op"
    who = "a kernel" if backend == AUTO else f"backend {backend!r}, asked for explicitly,"
    raise RuntimeError(f"{op}: expected {who} to serve this call, got none that can: {detail}")
