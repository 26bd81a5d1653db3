"""Times calls. The contenders of a case take turns, so that drift affects all of them alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from .clocks import HOST, Call, Clock, timer_of
from .results import Row

# A shorter sample measures mostly the clock and the loop, so such calls are timed in batches.
_SHORTEST_SAMPLE_S = 200e-6
# A contender has at least _ROUNDS turns, with at most _IN_A_ROW samples in each.
_ROUNDS, _IN_A_ROW = 5, 4
# A call longer than this many caps is sampled once.
_ONCE = 3
# Below this an estimate is too rough, because checking or measuring memory was part of the call.
_ROUGH_S = 20e-3


@dataclass(frozen=True)
class StoppingRule:
    """When a contender has been timed enough.

    Attributes:
        cap_s: seconds of samples after which timing stops, even if they are noisy.
        noise: timing stops earlier once (p80 - p20) / (2 * median) is below this and there are
            `min_samples` samples.
        min_samples: the least number of samples. A call longer than three caps gets only one.
        max_samples: the largest number of samples; only short calls reach it.
    """

    cap_s: float = 1.0
    noise: float = 0.02
    min_samples: int = 5
    max_samples: int = 200


@dataclass
class Samples:
    """Seconds per call, one entry per sample in the order taken, and the timer's name."""

    seconds: list[float] = field(default_factory=list)
    calls_per_sample: int = 1
    timer: str = HOST

    @property
    def spent(self) -> float:
        """Seconds on the clock so far."""
        return sum(self.seconds) * self.calls_per_sample


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    if len(samples) == 1:
        return (samples[0],) * 3
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return deciles[1], statistics.median(samples), deciles[7]


def noise(samples: list[float]) -> float:
    """Half the distance from p20 to p80, relative to the median."""
    p20, median, p80 = quantiles(samples)
    return (p80 - p20) / (2 * median)


def time_columns(samples: Samples) -> Row:
    """The columns of a timed row."""
    p20, median, p80 = quantiles(samples.seconds)
    return {
        "status": "ok",
        # Five digits: clocks are no more exact, and more digits would double the files.
        "samples_s": [float(f"{x:.5g}") for x in samples.seconds],
        "median_s": median,
        "p20_s": p20,
        "p80_s": p80,
        "calls_per_sample": samples.calls_per_sample,
        "timer": samples.timer,
    }


def interleaved(
    calls: Mapping[str, Call],
    rule: StoppingRule,
    clock: Clock,
    estimates: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Time all calls in turns. Each round gives every unfinished call some of its samples.

    A slow call gets one sample a round and a fast call several in a row. So the samples of all
    calls spread over the same time. Each round has a new random order. `estimates` are the seconds
    of calls that were already made. Calls with a short estimate or none are warmed up and estimated
    again.
    """
    results = {name: Samples() for name in calls}
    estimate = dict(estimates or {})
    for name, call in calls.items():
        if estimate.get(name, 0.0) < _ROUGH_S:
            clock(call, 1)
            once = max(clock(call, 1), 1e-7)
            results[name].calls_per_sample = max(1, round(_SHORTEST_SAMPLE_S / once))
            estimate[name] = clock(call, results[name].calls_per_sample)
    active, order, turn = list(calls), random.Random(0), 0
    while active:
        turn += 1
        # A fixed order favours the call after a contender that leaves the inputs in cache, by 30 %
        # for calls under a millisecond.
        for name in order.sample(active, len(active)):
            done = results[name]
            share = int(rule.cap_s / _ROUNDS / max(estimate[name], 1e-7))
            for _ in range(max(1, min(share, _IN_A_ROW))):
                seconds = clock(calls[name], done.calls_per_sample)
                done.seconds.append(seconds / done.calls_per_sample)
            done.timer = timer_of(clock, calls[name])
            if _finished(done, rule, turn):
                active.remove(name)
    return results


def _finished(done: Samples, rule: StoppingRule, turn: int) -> bool:
    count = len(done.seconds)
    if done.seconds[0] * done.calls_per_sample > _ONCE * rule.cap_s:
        return True
    if count < rule.min_samples:
        return False
    if done.spent >= rule.cap_s or count >= rule.max_samples:
        return True
    # A busy neighbour process delays every thread barrier by the same 8 ms, so that for a moment
    # all samples agree. Only agreement over several turns counts.
    return turn >= _ROUNDS and noise(done.seconds) < rule.noise
