"""The suites: which cases are measured, and in which order.

A time budget cuts a suite off where it is spent, so what says most comes first. A suite has its own
sizes on each device: what a GPU does in a millisecond takes two cores half a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rosa_kernels.testing import Case

from ..contenders.overhead import overhead_cases
from . import cpu, cuda, layer


class Suite(NamedTuple):
    """What a suite is for, and its cases for a seed."""

    what: str
    cpu: Callable[[int], list[Case]]
    cuda: Callable[[int], list[Case]]

    def cases(self, device: str, seed: int) -> list[Case]:
        """Each case once, where it first comes up."""
        build = self.cuda if device == "cuda" else self.cpu
        return list(dict.fromkeys(build(seed)))


SUITES: dict[str, Suite] = {
    "quick": Suite("enough for every plot, in about three minutes a device", cpu.quick, cuda.quick),
    "first": Suite(
        "what to know of a GPU first: SDDMM on seven real masks; on a CPU a rehearsal of it",
        cpu.first,
        cuda.first,
    ),
    "second": Suite(
        "what to know next: the other real masks, decoding, merging; on a CPU a rehearsal of it",
        cpu.second,
        cuda.second,
    ),
    "rosa": Suite(
        "the 21 real masks, at their own shapes and replicated to those of models, beside uniform",
        cpu.rosa,
        cuda.rosa,
    ),
    "density": Suite(
        "uniform masks, and generated ones of all kinds of layer, over density",
        cpu.density,
        cuda.density,
    ),
    "tokens": Suite(
        "SpMM at the 1 to 64 tokens of decoding; SDDMM over the number of tokens",
        cpu.tokens,
        cuda.tokens,
    ),
    "llm": Suite(
        "the linear layers of named models: dS in training, decoding, merging", cpu.llm, cuda.llm
    ),
    "layer": Suite(
        "a RoSA layer and the whole step of training, beside LoRA, full fine-tuning and PEFT",
        layer.cpu,
        layer.cuda,
    ),
    "overhead": Suite(
        "one tiny case per op: what a call costs beyond its kernel", overhead_cases, overhead_cases
    ),
}
