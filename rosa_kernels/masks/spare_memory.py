"""The memory that is free for sums of gradients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

# The rest is for the forward and backward whose gradients are summed.
SHARE = 4
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def spare_memory(devices: Iterable[torch.device]) -> int:
    """A quarter of the free memory in bytes, of the device that has least; 0 if it is unknown."""
    return min((_free(device) // SHARE for device in {*devices}), default=0)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch's allocator also gives out what it holds and does not use.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return _free_of_host() if device.type == "cpu" else 0


def _free_of_host() -> int:
    """What Linux can give without swapping, within the limit of the container."""
    free = [_field(_MEMINFO, "MemAvailable:") * 1024]
    limit = _number(_CGROUP / "memory.max")
    if limit is not None:
        # The page cache counts as used, and is given up when memory is needed.
        used = _number(_CGROUP / "memory.current") or 0
        free.append(limit - used + _field(_CGROUP / "memory.stat", "inactive_file"))
    return max(min(free), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
