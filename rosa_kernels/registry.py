"""The registry: which kernels exist, and which backend is asked for."""

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
# What rosa_kernels.choice remembers; forgotten when there is another kernel to choose.
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
    chosen.clear()
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


def backend_for_gradient(op: str, backend: str) -> str:
    """The backend to ask for `op` in the gradient of an op that was asked of `backend`.

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
