"""Device time of each GPU kernel of a call, by torch.profiler, and the stage of each kernel."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .clocks import Call, Flush

# (name, start, duration), in microseconds.
Event = tuple[str, float, float]

CALLS, _WARM_UP = 20, 3
# Our __global__ functions -> their stages in the cost model. A launch has one time, so a kernel
# that does two predicted stages has both names, joined by "+".
_STAGES = {
    "pack_kernel": "pack",
    "sddmm_tile_kernel": "tiles",
    "sddmm_wgmma_kernel": "tiles",
    "sddmm_gather_kernel": "gather",
    "sddmm_finalize_kernel": "finalize",
    "spmm_staged_kernel": "stage+gather",
    "spmm_gather_kernel": "gather",
    "spmm_tile_kernel": "tiles+gather",
    "spmm_unpermute_kernel": "unpermute",
}
ORDER = tuple(dict.fromkeys(_STAGES.values()))
# Matches whole names: in "void rosa::cuda::pack_kernel<...>(...)", and in a mangled
# "11pack_kernelI..."
_NAMES = re.compile(rf"(?<![A-Za-z_])({'|'.join(_STAGES)})(?![a-z0-9_])")


def stage_of(kernel: str) -> str:
    """The stage of one of our kernels, or the plain name of any other kernel."""
    found = _NAMES.search(kernel)
    if found is not None and "rosa" in kernel:
        return _STAGES[found[1]]
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain)[0].strip() or kernel


def by_stage(kernels: Mapping[str, float]) -> dict[str, float]:
    """Times by kernel, added up by stage."""
    stages: dict[str, float] = defaultdict(float)
    for name, time in kernels.items():
        stages[stage_of(name)] += time
    return dict(stages)


def per_call(events: Iterable[Event], between: Collection[str]) -> dict[str, float]:
    """Microseconds per call of each kernel: summed within a call, then the median over calls.

    `between` holds the names of the kernels that ran between two calls. All other kernels are part
    of a call.
    """
    calls: list[dict[str, float]] = []
    inside = False
    for name, _, duration in sorted(events, key=lambda event: event[1]):
        if name in between:
            inside = False
            continue
        if not inside:
            calls.append(defaultdict(float))
            inside = True
        calls[-1][name] += duration
    names = dict.fromkeys(name for call in calls for name in call)
    return {name: statistics.median(call.get(name, 0.0) for call in calls) for name in names}


class Profiler:
    """Times the kernels of calls on a device, each from a cold L2 cache.

    Attributes:
        missing: why there are no times here, or None.
    """

    def __init__(self, device: str) -> None:
        self.missing: str | None = None
        self._between: frozenset[str] = frozenset()
        if device == "cpu":
            self.missing = "a CPU has no GPU kernels to time"
            return
        try:
            self._flush = Flush(device)
            # The first recording starts the profiler's library, in seconds. It may be empty.
            for _ in range(2):
                self._between |= {name for name, _, _ in recorded(self._flush)}
        except Exception as error:  # machines forbid profiling in many ways
            self.missing = f"torch.profiler failed: {type(error).__name__}: {error}".splitlines()[0]
            return
        if not self._between:
            self.missing = "torch.profiler recorded no GPU kernel: is CUPTI allowed here?"

    def times(self, call: Call) -> dict[str, float]:
        """Microseconds per call of each kernel, by its full name. Empty if `missing` is set."""
        if self.missing is not None:
            return {}
        for _ in range(_WARM_UP):
            call()

        def calls() -> None:
            for _ in range(CALLS):
                self._flush()
                call()

        return per_call(recorded(calls), self._between)


def recorded(run: Callable[[], object]) -> list[Event]:
    """What ran on the GPU while `run` was called."""
    torch.cuda.synchronize()  # earlier work must not be recorded
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
