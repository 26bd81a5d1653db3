"""Peak memory of a call."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from .clocks import Call

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def with_peak(call: Call, device: str) -> tuple[Any, int | None]:
    """The result of a call, and its peak memory beyond what was held before, with the result.

    On CUDA this is the peak of torch's allocator. On Linux it is the peak of the process's resident
    set, exact to a page. It includes memory that any library allocates, but not memory that the C
    heap had kept resident. The heap is therefore trimmed first. Elsewhere the peak is None.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return call(), None
    _trim_heap()
    try:
        _CLEAR.write_text("5")  # resets VmHWM, the peak, to the current size
    except OSError:  # a kernel or container that forbids it
        return call(), None
    before = _status_bytes("VmRSS")
    result = call()
    return result, max(_status_bytes("VmHWM") - before, 0)


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # only glibc needs it: others return memory by themselves
        libc.malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"with_peak: expected {key} in {_STATUS}, got none")
