"""The benchmark's clocks, on a simulated stream: they time the device and not the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numpy")

from bench_cases import FAST, right_sddmm, small_case

from bench.contenders.base import Contender
from bench.layer.case import layer_case
from bench.measuring import clocks, results, timing
from bench.run import runner

FLUSH = 0.06  # ms
SMALL = small_case("sddmm")


class Stream:
    """A host that enqueues work and a device that executes it. Each has its time in ms."""

    def __init__(self, monkeypatch) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(clocks, "_event", self.event)
        monkeypatch.setattr(torch, "sum", lambda *_, **options: self.enqueue("flush", FLUSH))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)

    def enqueue(self, what: str, cost: float) -> None:
        self.device = max(self.device, self.host) + cost
        self.log.append(what)

    def sleep(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.enqueue("delay", cycles / clocks._CLOCKS_PER_S * 1e3)

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(at=None)

        def record() -> None:
            event.at = max(self.device, self.host)
            self.log.append("event")

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: self.host >= event.at
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def call(self, cost: float, *, host: float = 0.0, waits: bool = False):
        """A call of two launches, which take `cost` ms together on the device.

        Args:
            cost: Time of both launches on the device, in ms.
            host: Time of the host for both launches, in ms: half of it before each launch.
            waits: Whether the host waits for the device after each launch.
        """

        def run() -> None:
            for _ in range(2):
                self.host += host / 2
                self.enqueue("call", cost / 2)
                if waits:
                    self.host = max(self.host, self.device)

        return run


@pytest.fixture
def stream(monkeypatch) -> Stream:
    return Stream(monkeypatch)


def cold() -> clocks.CudaClock:
    return clocks.CudaClock(flush=clocks.Flush("cpu", 64))


def test_each_call_is_timed_from_a_cold_cache(stream):
    clock = cold()
    assert clock(stream.call(2.0), 3) == pytest.approx(3 * 2e-3)
    assert stream.log == ["flush", "delay", "event", "call", "call", "event"] * 3
    assert clock(stream.call(0.5), 2) == pytest.approx(2 * 0.5e-3)  # events are used again


def test_the_hot_clock_flushes_nothing(stream):
    clock, call = clocks.CudaClock(clocks.HOT), stream.call(2.0)
    assert clock(call, 1) == pytest.approx(2e-3)
    assert stream.log == ["delay", "event", "call", "call", "event"]
    assert clock.timer_of(call) == "hot"


@pytest.mark.parametrize("count", [1, 7])
def test_a_slow_host_is_not_timed(stream, count):
    # The device is idle when the call begins, as at the first call of a batch.
    clock, call = cold(), stream.call(0.02, host=1.5)
    assert clock(call, count) == pytest.approx(count * 0.02e-3)
    assert clock.timer_of(call) == "cold"
    stream.host = max(stream.host, stream.device) + 5
    delays = stream.log.count("delay")
    assert clock(call, count) == pytest.approx(count * 0.02e-3)
    assert stream.log.count("delay") - delays == count  # the delay is remembered


def test_two_plain_events_would_time_the_host(stream):
    call = stream.call(0.02, host=1.5)
    start, end = stream.event(), stream.event()
    stream.enqueue("flush", FLUSH)
    start.record()
    call()
    end.record()
    assert start.elapsed_time(end) > 1.4  # the simulated stream must show this


@pytest.mark.parametrize("count", [1, 5])
def test_a_call_that_synchronizes_is_marked(stream, count):
    clock, call = cold(), stream.call(0.02, host=0.1, waits=True)
    # After its first wait, the host's time cannot be hidden. That is half of its time.
    assert clock(call, count) == pytest.approx(count * 0.07e-3)
    assert clock.timer_of(call) == "cold+host"
    samples = stream.log.count("delay")
    clock(call, count)
    assert stream.log.count("delay") - samples == count  # longer delays are not tried again
    assert clock.timer_of(stream.call(0.02)) == "cold"


def test_occasional_host_interruptions_are_not_marked(stream):
    clock, calls = cold(), iter(range(10**6))

    def call() -> None:
        stream.host += 30.0 if next(calls) % 10 == 0 else 0.01  # longer than any delay
        stream.enqueue("call", 0.05)

    for _ in range(200):  # one call at a time, so that the host is not ahead of the device
        assert clock(call, 1) == pytest.approx(0.05e-3)
    assert clock.timer_of(call) == "cold"


def test_a_host_beyond_the_longest_delay_is_marked(stream):
    clock, call = cold(), stream.call(1.0, host=60.0)
    assert clock(call, 1) > 1e-3
    assert clock.timer_of(call) == "cold+host"


def test_a_sample_holds_many_short_cold_calls(stream):
    calls = {"short": stream.call(0.005), "long": stream.call(3.0)}
    timed = timing.interleaved(calls, timing.StoppingRule(max_samples=5), cold())
    assert timed["short"].calls_per_sample == 40
    assert timed["long"].calls_per_sample == 1
    assert timed["short"].seconds == pytest.approx([5e-6] * len(timed["short"].seconds))
    assert stream.log.count("flush") == stream.log.count("call") / 2
    assert timing.time_columns(timed["short"])["timer"] == "cold"


def test_the_clock_does_not_keep_calls_alive(stream):
    clock = cold()
    clock(stream.call(1.0), 1)
    assert len(clock._known) == 0


def test_the_host_clock_excludes_the_device(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert clocks.host_clock(lambda: log.append("call"), 2) < 0.1
    assert log == ["wait", "call", "call", "wait"]
    assert clocks.clock_on("cuda", clocks.HOST) is clocks.host_clock
    assert clocks.clock_on("cpu", clocks.HOT) is clocks.cpu_clock
    assert clocks.timer_of(clocks.host_clock, print) == "host"


# -- graphs and rows ------------------------------------------------------------------------------


class Streams:
    """The part of torch.cuda's streams and graphs that captures a call."""

    def __init__(self, monkeypatch, capture_fails: bool = False) -> None:
        self.default = SimpleNamespace(wait_stream=lambda other: None)
        self.current, self.fails, self.replayed = self.default, capture_fails, 0
        outer = self

        class Context:
            def __init__(self, stream) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.before, outer.current = outer.current, self.stream

            def __exit__(self, *args) -> None:
                outer.current = self.before

        class Graph:
            def replay(self) -> None:
                outer.replayed += 1

        class Capture(Context):
            def __init__(self, graph) -> None:
                super().__init__(SimpleNamespace())

            def __exit__(self, *args) -> None:
                if outer.fails:  # torch raises before it restores the stream
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                super().__exit__()

        def make() -> SimpleNamespace:
            return SimpleNamespace(wait_stream=lambda other: None)

        for name, value in {
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "Stream": make,
            "stream": Context,
            "CUDAGraph": Graph,
            "graph": Capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_captured_call_is_replayed(monkeypatch):
    streams, calls = Streams(monkeypatch), []
    replay = clocks.captured(lambda: calls.append(streams.current is streams.default))
    assert calls == [False, False]  # warm-up and capture, neither on the default stream
    replay()
    assert (len(calls), streams.replayed) == (2, 1)
    assert streams.current is streams.default


def test_a_failed_capture_gives_the_reason(monkeypatch):
    streams = Streams(monkeypatch, capture_fails=True)
    with pytest.raises(RuntimeError, match=r"captured in a graph: operation not permitted .*ing$"):
        clocks.captured(lambda: None)
    assert streams.current is streams.default


def test_a_failed_capture_affects_only_its_own_row(monkeypatch):
    def capture(call):
        if capture.first:
            capture.first = False
            raise RuntimeError("cannot be captured in a graph: it waits")
        return call

    capture.first = True
    monkeypatch.setattr(clocks, "captured", capture)
    monkeypatch.setattr(runner, "_timer", lambda case, device, asked: asked)
    competing = [
        Contender("sddmm", name, "test", right_sddmm, token_major=True) for name in ("a", "b")
    ]
    rows = runner.run_case(SMALL, competing, FAST, "cpu", clocks.GRAPH)
    by_kernel = {row["kernel"]: row for row in rows}
    assert by_kernel["a"]["status"] == "error"
    assert "cannot be captured in a graph: it waits" in by_kernel["a"]["reason"]
    assert by_kernel["b"]["status"] == "ok"
    assert by_kernel["a"]["timer"] is None


def test_a_layer_is_not_captured():
    case = layer_case(64, 64, 32)
    competing = [SimpleNamespace(name="rosa", backend="ours", mode="fwd_bwd", charges=("op",))]
    (row,) = runner.run_case(case, competing, FAST, "cpu", clocks.GRAPH)
    assert row["reason"] == "a layer in training is not captured in a graph"


def test_cpu_rows_always_have_the_host_timer():
    peer = Contender("sddmm", "peer", "test", right_sddmm, token_major=True)
    rows = runner.run_case(SMALL, [peer], FAST, "cpu", clocks.HOT)
    assert {row["timer"] for row in rows} == {"host"}


def test_files_without_the_timer_column_can_be_read():
    (path, *_) = sorted((results.Path(__file__).parents[2] / "bench/rows").glob("*.jsonl"))
    assert {row["timer"] for row in results.read(path)} == {None}
