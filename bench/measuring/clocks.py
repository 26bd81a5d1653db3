"""Clocks: seconds that `count` calls in a row take, and what the name of a timer stands for.

- "host": what the host is busy for; on a CPU the whole call.
- "cold", "hot": the device's time of every call by itself, by events, with its L2 cache flushed
  before it, or as the call before it left it.
- "graph": as "cold", of the replay of a graph that the call was captured in once.
- "...+host": the device caught up with the host during the call, so that time of the host is on the
  clock: see :class:`CudaClock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]

COLD, HOT, GRAPH, HOST = "cold", "hot", "graph", "host"
DEVICE_TIMERS = (COLD, HOT, GRAPH)
WITH_HOST = "+host"

# What the host enqueues behind: enough for the launches of one op, which take it 50 to 100 us
# (estimated), and doubled where it is not.
_FIRST_DELAY_S, _LONGEST_DELAY_S = 200e-6, 20e-3
# Doubling comes to the longest delay at the eighth try. A call that misses so often in a row waits
# for the device itself; a host that was interrupted misses once.
_MISSES = 9
# Clocks a second that a delay is counted in: the fastest GPUs run at this, others wait longer.
_CLOCKS_PER_S = 2e9


def cpu_clock(call: Call, count: int) -> float:
    """Wall time by the monotonic high-resolution clock."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def host_clock(call: Call, count: int) -> float:
    """Seconds that the host is busy with calls whose device work goes on behind its back.

    The device starts idle. It may fall behind by a thousand launches before one blocks, which is
    more than `count` short calls make.
    """
    torch.cuda.synchronize()
    seconds = cpu_clock(call, count)
    torch.cuda.synchronize()
    return seconds


class Flush:
    """Evicts what calls left in the L2 cache, by reading more than any L2 holds.

    It does not write: dirty lines would be written back on the next call's time, 12 us for the
    50 MiB of an H200. Reading takes 60 us there (both estimated).
    """

    def __init__(self, device: str = "cuda", size_bytes: int = 2**28) -> None:
        # By default twice the largest L2 of today (H200: 50 MiB, B200: 126 MiB).
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
    """Device time of every call by itself, by events on the current stream.

    Before the start event the device is kept busy, so that the host has enqueued the whole call by
    the time the device comes to it. That is verified: once the end event is enqueued, the start
    event must not have completed. Otherwise time of the host may be on the clock; the sample is
    thrown away and the delay doubled. How long a call needs is remembered.

    A call that waits for the device itself never passes. It is timed all the same, after the first
    delay, and called "...+host": what the host does after it first waited is on the clock. So is a
    call of more launches than a stream holds, about a thousand.
    """

    def __init__(self, timer: str = COLD, flush: Call | None = None) -> None:
        self._timer = timer
        self._flush = flush or (Flush() if timer != HOT else None)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # Calls hold their operands: what is known of them must not keep them alive.
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
        """Whether a sample counts; what it says of the call is remembered."""
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
    """What to call the timer behind a call's samples."""
    return clock.timer_of(call) if isinstance(clock, CudaClock) else HOST


@cache
def clock_on(device: str, timer: str = COLD) -> Clock:
    """What times calls on a device. A CPU has wall time only, whatever the timer."""
    if device == "cpu":
        return cpu_clock
    return host_clock if timer == HOST else CudaClock(timer)


def captured(call: Call) -> Call:
    """The replay of a graph that a call was captured in.

    Raises:
        RuntimeError: it cannot be captured, with the reason.
    """
    before = torch.cuda.current_stream()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            call()  # what is made once is made outside of the graph
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        # torch leaves the stream of a capture that failed current.
        torch.cuda.set_stream(before)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"cannot be captured in a graph: {reason}") from error
    return lambda: graph.replay()
