"""The suites: which cases are measured, and in which order.

A time budget may end a suite early, so the most informative cases come first. A suite has its own
sizes on each device: what takes a GPU a millisecond takes two cores half a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rosa_kernels.testing import Case

from ..contenders.overhead import overhead_cases
from . import cpu, cuda, layer


class Suite(NamedTuple):
    """A suite's description, and its cases on each device for a seed."""

    what: str
    cpu: Callable[[int], list[Case]]
    cuda: Callable[[int], list[Case]]

    def cases(self, device: str, seed: int) -> list[Case]:
        """The cases without duplicates, each at its first place."""
        build = self.cuda if device == "cuda" else self.cpu
        return list(dict.fromkeys(build(seed)))


SUITES: dict[str, Suite] = {
    "quick": Suite(
        "cases for every plot, in about three minutes per device", cpu.quick, cuda.quick
    ),
    "first": Suite(
        "the first minutes on a GPU: SDDMM on seven real masks (on a CPU: a rehearsal)",
        cpu.first,
        cuda.first,
    ),
    "second": Suite(
        "the next minutes: the other real masks, decoding, merging (on a CPU: a rehearsal)",
        cpu.second,
        cuda.second,
    ),
    "rosa": Suite(
        "the 21 real masks, at their own shapes and replicated to model shapes, and uniform masks",
        cpu.rosa,
        cuda.rosa,
    ),
    "density": Suite(
        "uniform masks and generated masks of every kind of layer, at several densities",
        cpu.density,
        cuda.density,
    ),
    "tokens": Suite(
        "SpMM at 1 to 64 tokens, as in decoding; SDDMM at several numbers of tokens",
        cpu.tokens,
        cuda.tokens,
    ),
    "llm": Suite(
        "the linear layers of named models: SDDMM in training, SpMM in decoding, merging",
        cpu.llm,
        cuda.llm,
    ),
    "layer": Suite(
        "a RoSA layer and a whole training step, against LoRA, full fine-tuning and PEFT",
        layer.cpu,
        layer.cuda,
    ),
    "overhead": Suite(
        "one tiny case per op: the cost of a call in addition to its kernel",
        overhead_cases,
        overhead_cases,
    ),
}
