"""Clocks: each measures the seconds of `count` calls in a row, and its timer has a name.

- "host": the time that the host is busy; on a CPU this is the whole call.
- "cold": the device's time of each call, by events, after a flush of the L2 cache.
- "hot": as "cold", but without the flush: L2 holds what the previous call left there.
- "graph": as "cold", but the call was captured in a CUDA graph once, and the graph is replayed.
- "...+host": the device caught up with the host, so the time includes time of the host. See
  :class:`CudaClock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .names import DEVICE_TIMERS

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]

COLD, HOT, GRAPH = DEVICE_TIMERS
HOST = "host"
WITH_HOST = "+host"

# The device waits this long while the host enqueues the launches of one op, which takes the host 50
# to 100 us (estimated). A delay that is too short is doubled.
_FIRST_DELAY_S, _LONGEST_DELAY_S = 200e-6, 20e-3
# Doubling reaches the longest delay at the eighth try. A host that was interrupted misses once. A
# call that misses this often in a row waits for the device itself.
_MISSES = 9
# Cycles per second of delay. The fastest GPUs run at this rate; slower ones wait longer.
_CLOCKS_PER_S = 2e9


def cpu_clock(call: Call, count: int) -> float:
    """Wall time, by the monotonic high-resolution clock."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def host_clock(call: Call, count: int) -> float:
    """Seconds that the host is busy with calls whose device work runs asynchronously.

    The device starts idle. It may fall behind by about a thousand launches before one blocks. That
    is more than `count` short calls make.
    """
    torch.cuda.synchronize()
    seconds = cpu_clock(call, count)
    torch.cuda.synchronize()
    return seconds


class Flush:
    """Evicts what calls left in the L2 cache, by reading more than any L2 holds.

    It does not write, because dirty lines would be written back during the next call: 12 us for the
    50 MiB of an H200. Reading takes 60 us there (both estimated).
    """

    def __init__(self, device: str = "cuda", size_bytes: int = 2**28) -> None:
        # The default is twice the largest L2 of today (H200: 50 MiB, B200: 126 MiB).
        self._data = torch.zeros(size_bytes // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self._data, dim=0, out=self._sum)


@dataclass
class _Known:
    """What a clock has learned about a call."""

    delay_s: float = _FIRST_DELAY_S
    misses: int = 0  # in a row
    waits: bool = False


class CudaClock:
    """Device time of each call, by events on the current stream.

    Before the start event the device is kept busy, so that the host can enqueue the whole call
    before the device reaches it. This is verified: when the end event has been enqueued, the start
    event must not have completed. Otherwise the sample may include time of the host. The sample is
    then thrown away and the delay doubled. The clock remembers the delay that each call needs.

    A call that waits for the device itself never passes. It is timed after the first delay and
    marked "...+host": its time includes what the host does after its first wait. The same holds for
    a call of more launches than a stream holds, which is about a thousand.
    """

    def __init__(self, timer: str = COLD, flush: Call | None = None) -> None:
        self._timer = timer
        self._flush = flush or (Flush() if timer != HOT else None)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # Weak keys: a call holds its operands, and this table must not keep them alive.
        self._known: WeakKeyDictionary[Call, _Known] = WeakKeyDictionary()

    def __call__(self, call: Call, count: int) -> float:
        known = self._known.setdefault(call, _Known())
        while len(self._events) < count:
            self._events.append((_event(), _event()))
        done = 0
        while done < count:
            start, end = self._events[done]
            if self._flush is not None:
                self._flush()
            torch.cuda._sleep(int(known.delay_s * _CLOCKS_PER_S))
            start.record()
            call()
            end.record()
            done += self._counts(known, overtaken=start.query())
        self._events[count - 1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events[:count]) / 1e3

    def _counts(self, known: _Known, overtaken: bool) -> bool:
        """Whether a sample counts. Updates what is known about the call."""
        if known.waits:
            return True
        if not overtaken:
            known.misses = 0
            return True
        known.misses += 1
        known.delay_s = min(2 * known.delay_s, _LONGEST_DELAY_S)
        if known.misses == _MISSES:
            known.waits, known.delay_s = True, _FIRST_DELAY_S
        return False

    def timer_of(self, call: Call) -> str:
        """The timer of a call's samples so far."""
        known = self._known.get(call)
        return self._timer + (WITH_HOST if known is not None and known.waits else "")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def timer_of(clock: Clock, call: Call) -> str:
    """The name of the timer that measured a call's samples."""
    return clock.timer_of(call) if isinstance(clock, CudaClock) else HOST


@cache
def clock_on(device: str, timer: str = COLD) -> Clock:
    """The clock of a device for a timer. On a CPU every timer is wall time."""
    if device == "cpu":
        return cpu_clock
    return host_clock if timer == HOST else CudaClock(timer)


def captured(call: Call) -> Call:
    """Capture a call in a CUDA graph; the result replays the graph.

    Raises:
        RuntimeError: the call cannot be captured; the message has the reason.
    """
    before = torch.cuda.current_stream()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            call()  # one-time setup happens outside the graph
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        # After a failed capture, torch leaves the capture's stream current.
        torch.cuda.set_stream(before)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"cannot be captured in a graph: {reason}") from error
    return lambda: graph.replay()
