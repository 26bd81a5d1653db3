"""The suites at sizes for a CPU with a few cores."""

from __future__ import annotations

from dataclasses import replace

from rosa_kernels.testing import Case

from .. import masks
from ..contenders.overhead import overhead_cases
from ..measuring.names import PRODUCTS
from . import layer as layers
from .builders import (
    BF16,
    DECODE_TOKENS,
    F32,
    MODELS,
    ROSA_DENSITY,
    elementwise,
    of_layer,
    real,
    sweep,
)

_SQUARE = (4096, 4096)
_BOTH = ("uniform", "q_proj")
# RoSA papers train 0.1 to 2 %; 5 % shows where dense starts to win.
_DENSITIES = (0.001, 0.003, 0.005, 0.01, 0.02, 0.05)

# Suites that are made elsewhere.
layer, overhead = layers.cpu, overhead_cases


def quick(seed: int) -> list[Case]:
    """Cases for every plot, mostly at 1024 tokens instead of 2048."""
    cases = overhead_cases(seed)
    cases += elementwise(_BOTH, _SQUARE, (ROSA_DENSITY,), F32, seed)
    cases += real(of_layer(14), None, (2048,), F32, seed)
    cases += [
        Case(op, 4096, 4096, k, 0.01, dtype, mask, seed)
        for mask in _BOTH
        for k, dtype in ((2048, F32), (1024, BF16))
        for op in PRODUCTS
    ]
    # Density is the outer loop: if the time budget ends here, both masks have the same curve so
    # far.
    cases += [
        Case(op, 4096, 4096, 1024, density, F32, mask, seed)
        for density in (0.001, 0.003, 0.01, 0.02, 0.05)
        for mask in _BOTH
        for op in PRODUCTS
    ]
    return cases


def first(seed: int) -> list[Case]:
    """A rehearsal of the GPU's suite, at the masks' own shapes and 256 tokens."""
    own = real(of_layer(14), None, (256,), F32, seed, ops=("sddmm",))
    masked = [case for case in own if case.mask != "uniform"]
    return [*masked, replace(masked[0], mask="uniform")]


def second(seed: int) -> list[Case]:
    """A rehearsal of the GPU's suite, with fewer cases."""
    other = real(("0.q_proj", "29.down_proj"), None, (256,), F32, seed, ops=("sddmm",))
    return [
        *real(("14.q_proj",), None, (1, 8, 64), F32, seed, ops=("spmm",)),
        *elementwise(("q_proj",), (1024, 1024), (ROSA_DENSITY,), F32, seed),
        *(case for case in other if case.mask != "uniform"),
        *real(("14.gate_proj",), None, (1, 8, 64), F32, seed, ops=("spmm",)),
    ]


def rosa(seed: int) -> list[Case]:
    """Real masks at 2048 tokens: at their own shapes, then replicated to about 4096 x 4096."""
    names, large = masks.real_names(), dict.fromkeys(masks.KINDS, (_SQUARE,))
    cases = real(names, None, (2048,), F32, seed)
    cases += real(names, None, (2048,), BF16, seed)
    return cases + real(names, large, (2048,), F32, seed)


def density(seed: int) -> list[Case]:
    """Masks of all kinds over density, at 4096 x 4096 and 2048 tokens."""
    cases = [
        Case(op, 4096, 4096, 2048, density, dtype, mask, seed)
        for dtype, chosen in (
            (F32, ("uniform", *masks.KINDS)),
            (BF16, ("uniform", "q_proj", "down_proj")),
        )
        for mask in chosen
        for density in _DENSITIES
        for op in PRODUCTS
    ]
    cases += elementwise(_BOTH, _SQUARE, (0.001, ROSA_DENSITY, 0.05), F32, seed)
    cases += elementwise(_BOTH, _SQUARE, (ROSA_DENSITY,), BF16, seed)
    return cases + overhead_cases(seed)


def tokens(seed: int) -> list[Case]:
    """Curves over the number of tokens, at 2048 x 2048."""
    shape, rate = (2048, 2048), (ROSA_DENSITY,)
    return [
        *sweep("spmm", _BOTH, shape, DECODE_TOKENS, rate, F32, seed),
        *sweep("sddmm", _BOTH, shape, (64, 128, 256, 512, 1024), rate, F32, seed),
    ]


def llm(seed: int) -> list[Case]:
    """All layers of the smallest model, and two layers of a large one.

    SDDMM has 256 tokens; SpMM has 1 and 16.
    """
    large = MODELS["Llama-2-7B"]
    layers = [
        *MODELS["SmolLM2-135M"].items(),
        *((kind, large[kind]) for kind in ("q_proj", "gate_proj")),
    ]
    rate = (ROSA_DENSITY,)
    return [
        case
        for kind, shape in layers
        for case in (
            *sweep("sddmm", (kind,), shape, (256,), rate, F32, seed),
            *sweep("spmm", (kind,), shape, (1, 16), rate, F32, seed),
            *elementwise((kind,), shape, rate, F32, seed),
        )
    ]
