"""The memory of a step: resident pages, live tensors, tensors saved for backward, kept tensors.

On a CPU each contender is measured in a process of its own. There the C heap maps every block of
128 KiB or more separately, and unmaps it when it is freed. So the peak of the resident set belongs
to this contender and to none before it. The rows also have exact counts of tensor bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..measuring.memory import with_peak
from ..measuring.results import Row
from .case import Adapted, LayerCase, LayerProblem
from .contenders import contender_of
from .step import quiet, step_of

_M_MMAP_THRESHOLD = -3  # of mallopt; setting it stops glibc from adapting it
_MAPPED_FROM = 128 * 2**10
_WARM_CALLS = 2
Call = Callable[[], Any]


class MemoryMeter:
    """Measures the memory of a run's contenders, in child processes if the device is a CPU.

    The children are forked from a server that has imported torch but never computed. A fork of a
    process whose OpenMP pool has started hangs, and a new Python process takes six seconds to
    start.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # __name__, because the wheel installs this module under another name.
        self._context.set_forkserver_preload([__name__, "peft"])

    def __call__(self, case: LayerCase, name: str, mode: str, device: str, threads: int) -> Row:
        """The memory columns of one contender in one mode."""
        if device != "cpu":
            return measure_memory(case, name, mode, device, threads)
        with _interrupts_ignored():  # the server and its children inherit it
            forkserver.ensure_running()
        with ProcessPoolExecutor(1, self._context, _settle) as pool:
            return pool.submit(measure_memory, case, name, mode, device, threads).result()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C. A terminal sends it to children as well, whose tracebacks help nobody."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _settle() -> None:
    """Prepare a child: Ctrl-C ends it at once, and its C heap returns memory."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)


def measure_memory(case: LayerCase, name: str, mode: str, device: str, threads: int) -> Row:
    """The memory columns of one contender, measured in this process."""
    torch.set_num_threads(threads)
    contender = contender_of(case, name, mode, device)
    problem = LayerProblem(case, device)
    problem.base()  # shared by all contenders, so not counted
    with quiet():
        before = _tensor_bytes()
        parametrizations = contender.parametrizations(problem)
        adapted = contender.build(problem, parametrizations)
        del parametrizations
        masks.pattern_of.cache_clear()  # peers have their own copy of the mask
        call = step_of(problem, adapted, mode)
        for _ in range(_WARM_CALLS):
            call()
        call.clear()
        inputs = problem.x.nbytes + problem.dy.nbytes
        held = _tensor_bytes() - before + inputs
        peak = with_peak(call, device)[1]
        call.clear()
        live = peak if device == "cuda" else live_peak(call)
        call.clear()
        saved = saved_bytes(problem, adapted)
    return {"peak_bytes": peak, "held_bytes": held, "live_bytes": live, "saved_bytes": saved}


def live_peak(call: Call) -> int:
    """The peak bytes of live tensors during a call, beyond those before it.

    They are summed from every allocation and release of torch's CPU allocator. Its profiler sees
    them all, including temporaries inside operators.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        call()
    results = profile.profiler.kineto_results
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        now += change
        most = max(most, now)
    return most


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Hide the lines that the profiler's library writes to stderr directly."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def saved_bytes(problem: LayerProblem, adapted: Adapted) -> int:
    """Bytes that a forward saves for its backward, without parameters and buffers.

    Two views of one storage count once, at the storage's size.
    """
    held = {t.untyped_storage().data_ptr() for t in adapted.module.state_dict().values()}
    held |= {p.untyped_storage().data_ptr() for p in adapted.module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sparse = tensor.layout == torch.sparse_coo
        for part in (tensor._indices(), tensor._values()) if sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in held:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = problem.run(adapted.module, problem.leaf())
    del y
    return sum(found.values())


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python's garbage collector knows; each storage counts once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor) or thing.device.type == "meta":
            continue
        if thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
