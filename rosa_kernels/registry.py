"""The registry of kernels, and the backend that is requested."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

import torch

from rosa_kernels.kernel import AUTO, AUTO_FINITE, Call, Estimate, Kernel

_Function = TypeVar("_Function", bound=Callable[..., Any])

_kernels: dict[str, list[Kernel]] = {}
_requested: ContextVar[str | None] = ContextVar("rosa_backend", default=None)
_known_backends: set[str] = set()
_plan_readers: dict[tuple[str, str, str], bool] = {}
# The choices that rosa_kernels.choice remembers. A change of the kernels clears them.
chosen: dict[tuple[Any, ...], Kernel] = {}


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
    """Decorator that registers a function as a kernel of `op`.

    The tests and benchmarks then include it. The arguments are the attributes of :class:`Kernel`;
    `unavailable` is its `availability`, and may be a function.

    Raises:
        ValueError: `op` has a kernel of this name already.
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
    """Within the block, kernels of these names serve only on request, in every thread.

    It is for kernels whose results are in doubt.
    """
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
    chosen.clear()
    _plan_readers.clear()


def kernels(op: str | None = None) -> tuple[Kernel, ...]:
    """All registered kernels of `op` (of every op if None), by descending priority.

    Raises:
        ValueError: no such op. The message lists the ops.
    """
    if op is None:
        return tuple(k for op_kernels in _kernels.values() for k in op_kernels)
    if op not in _kernels:
        raise ValueError(f"kernels: expected an op among {sorted(_kernels)}, got {op!r}")
    return tuple(_kernels[op])


def backend_names() -> list[str]:
    """All names that `backend=`, `use_backend` and ROSA_BACKEND accept."""
    names = {AUTO, AUTO_FINITE}
    for kernel in kernels():
        names |= {kernel.backend, kernel.name}
    return sorted(names)


def check_backend(name: str) -> str:
    """Return `name` if it is one of :func:`backend_names`.

    Raises:
        ValueError: it is not. The message lists the names.
    """
    if name not in _known_backends:  # listing the names costs 10 us
        names = backend_names()
        if name not in names:
            raise ValueError(f"expected a backend among {', '.join(names)}, got {name!r}")
        _known_backends.add(name)
    return name


def _constant_when_traced(function: _Function) -> _Function:
    """Mark a function as torch.compiler.assume_constant_result does.

    That function imports torch._dynamo, which takes a second even for users who never compile.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ops run on backend `name` ("cpu", "cpu/avx2", "reference", "auto", ...).

    An explicit backend has no fallback: an op that it cannot serve raises RuntimeError.

    Raises:
        ValueError: no such backend. The message lists the backends.
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
    """The requested backend: the argument, else use_backend, else ROSA_BACKEND, else "auto".

    Under ``torch.compile``, the last three are read once, when the code is traced.
    """
    return _ambient() if backend is None else check_backend(backend)


def backend_for_gradient(op: str, backend: str) -> str:
    """The backend to request for `op` in the gradient of an op that was requested on `backend`.

    The same name, if `op` has that variant. Otherwise the variant is dropped: "cuda/wgmma" becomes
    "cuda". Variants for finite operands only are dropped too, because gradients may hold Inf.
    """
    if "/" not in backend:
        return backend
    if any(kernel.name == backend and not kernel.finite_only for kernel in kernels(op)):
        return backend
    return backend.split("/", 1)[0]


@_constant_when_traced
def reads_plan(op: str, device: str, backend: str) -> bool:
    """Whether a kernel of `op` that `backend` may name uses the tile plan on this device type."""
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
