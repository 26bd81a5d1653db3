"""The suites at sizes for one large GPU, in bfloat16 unless said otherwise.

Some cases are in float32 or float16 because a peer supports nothing else: cuSPARSE has no bfloat16
SDDMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rosa_kernels.testing import Case

from .. import masks
from ..contenders.overhead import overhead_cases
from . import layer as layers
from .builders import (
    BF16,
    DECODE_TOKENS,
    F16,
    F32,
    MODELS,
    ROSA_DENSITY,
    Shape,
    elementwise,
    of_layer,
    real,
    sweep,
)

SQUARE, WIDE, TALL, TALLER = (4096, 4096), (4096, 11008), (11008, 4096), (14336, 4096)
SHAPES = (SQUARE, TALL, WIDE, TALLER)
TOKENS = (8192, 2048, 16384)
DENSITIES = (0.006, 0.01, 0.003, 0.02)
UNIFORM = (0.001, 0.006, 0.01, 0.05, 0.003, 0.02, 0.1, 0.0005)

_BOTH, _RATE = ("uniform", "q_proj"), (ROSA_DENSITY,)
_ELEMENTWISE = (ROSA_DENSITY, 0.001, 0.02)
# The shapes of each kind of layer in models of 7 and 8 billion weights.
_NATURAL: dict[str, Sequence[Shape]] = {
    **dict.fromkeys(masks.KINDS, (SQUARE,)),
    "gate_proj": (TALL, TALLER),
    "up_proj": (TALL, TALLER),
    "down_proj": (WIDE,),
}
_ONE_SHAPE = {kind: shapes[:1] for kind, shapes in _NATURAL.items()}

# Suites that are made elsewhere.
layer, overhead = layers.cuda, overhead_cases


def quick(seed: int) -> list[Case]:
    """One layer's real masks, two curves over density, decoding and merging; mostly 8192 tokens."""
    return [
        *overhead_cases(seed),
        *sweep("sddmm", _BOTH, SQUARE, (8192,), (0.006, 0.02), BF16, seed),
        *_replicated((14,), (8192,), BF16, seed),
        *sweep("spmm", _BOTH, SQUARE, (1, 8, 64), _RATE, BF16, seed),
        *elementwise(_BOTH, SQUARE, _RATE, BF16, seed),
        *sweep("sddmm", _BOTH, SQUARE, (2048,), _RATE, F32, seed),
        *sweep("sddmm", _BOTH, SQUARE, (8192,), (0.001, 0.003, 0.01, 0.05), BF16, seed),
        *_generated((8192,), _RATE, seed),
    ]


def first(seed: int) -> list[Case]:
    """SDDMM on the real masks of one layer, q_proj first.

    The last case is a uniform mask with the shape and density of q_proj.
    """
    replicated = real(of_layer(14), _ONE_SHAPE, (8192,), BF16, seed, ops=("sddmm",))
    masked = [case for case in replicated if case.mask != "uniform"]
    return [*masked, replace(masked[0], mask="uniform")]


def second(seed: int) -> list[Case]:
    """One mask of every other op comes first, so that each op has a number. The rest follows."""
    other = [
        case
        for layer in (0, 29)
        for case in real(of_layer(layer), _ONE_SHAPE, (8192,), BF16, seed, ops=("sddmm",))
    ]
    decoding = real(of_layer(14), _ONE_SHAPE, (1, 8, 64), BF16, seed, ops=("spmm",))
    return [
        *(case for case in decoding if case.mask == "real:14.q_proj"),
        *elementwise(("q_proj", "uniform"), SQUARE, _RATE, BF16, seed),
        *(case for case in other if case.mask != "uniform"),
        *decoding,
    ]


def rosa(seed: int) -> list[Case]:
    """Real masks at model shapes.

    Layer 14 comes first and stands for the others if the time ends. The last masks are so small
    that dense wins.
    """
    return [
        *_replicated((14, 0, 29), (8192,), BF16, seed),
        *_replicated((14,), (2048, 16384), BF16, seed),
        *_replicated((14,), (2048,), F32, seed),
        *_replicated((14,), (16,), BF16, seed, op="spmm"),
        *_replicated((0, 29), (2048, 16384), BF16, seed),
        *_replicated((14,), (2048,), F16, seed),
        *real(of_layer(14), None, (8192,), BF16, seed, ops=("sddmm",)),
    ]


def density(seed: int) -> list[Case]:
    """Each kind of layer at its own shapes comes first, every kind at every shape last."""
    return [
        *sweep("sddmm", ("uniform",), SQUARE, (8192,), UNIFORM, BF16, seed),
        *_generated((8192,), DENSITIES, seed),
        *elementwise(_BOTH, SQUARE, _ELEMENTWISE, BF16, seed),
        *sweep("sddmm", _BOTH, SQUARE, (2048,), (0.006, 0.02), F32, seed),
        *sweep("sddmm", _BOTH, SQUARE, (2048,), _RATE, F16, seed),
        *_generated((2048, 16384), DENSITIES, seed),
        *sweep("sddmm", ("uniform",), SQUARE, (2048, 16384), UNIFORM, BF16, seed),
        *sweep("sddmm", ("uniform",), TALL, TOKENS, UNIFORM, BF16, seed),
        *elementwise(("uniform", "gate_proj"), TALLER, _ELEMENTWISE, BF16, seed),
        *elementwise(_BOTH, SQUARE, _ELEMENTWISE, F32, seed),
        *overhead_cases(seed),
        *_everywhere(("uniform",), UNIFORM, seed),
        *_everywhere(tuple(masks.KINDS), DENSITIES, seed),
    ]


def tokens(seed: int) -> list[Case]:
    """Curves over the number of tokens at 0.6 %; for decoding also at 0.3 and 2 %."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    return [
        *sweep("spmm", _BOTH, SQUARE, DECODE_TOKENS, _RATE, BF16, seed),
        *sweep("sddmm", _BOTH, SQUARE, lengths, _RATE, BF16, seed),
        *sweep("spmm", ("gate_proj",), TALL, DECODE_TOKENS, _RATE, BF16, seed),
        *sweep("spmm", ("down_proj",), WIDE, DECODE_TOKENS, _RATE, BF16, seed),
        *sweep("spmm", _BOTH, SQUARE, DECODE_TOKENS, _RATE, F32, seed),
        *sweep("spmm", _BOTH, SQUARE, (1, 16, 64), (0.003, 0.02), BF16, seed),
        *sweep("spmm", _BOTH, SQUARE, (1, 16, 64), _RATE, F16, seed),
        *sweep("spmm", _BOTH, SQUARE, (256, 1024, 4096), _RATE, BF16, seed),
        *sweep("sddmm", ("gate_proj",), TALL, lengths, _RATE, BF16, seed),
        *sweep("sddmm", ("down_proj",), WIDE, lengths, _RATE, BF16, seed),
    ]


def llm(seed: int) -> list[Case]:
    """All layers of all models: SDDMM at 8192 tokens, SpMM at 1 and 16."""
    return [
        case
        for layers in MODELS.values()
        for kind, shape in layers.items()
        for case in (
            *sweep("sddmm", (kind,), shape, (8192,), _RATE, BF16, seed),
            *sweep("spmm", (kind,), shape, (1, 16), _RATE, BF16, seed),
            *elementwise((kind,), shape, _RATE, BF16, seed),
        )
    ]


def _generated(tokens: Sequence[int], densities: Sequence[float], seed: int) -> list[Case]:
    """SDDMM on a generated mask of every kind at its shapes. Density is the outer loop."""
    return [
        case
        for density in densities
        for kind in masks.KINDS
        for shape in _NATURAL[kind]
        for case in sweep("sddmm", (kind,), shape, tokens, (density,), BF16, seed)
    ]


def _everywhere(names: Sequence[str], densities: Sequence[float], seed: int) -> Iterator[Case]:
    for shape in SHAPES:
        yield from sweep("sddmm", names, shape, TOKENS, densities, BF16, seed)


def _replicated(
    layers: Sequence[int], tokens: Sequence[int], dtype: torch.dtype, seed: int, op: str = "sddmm"
) -> list[Case]:
    """Real masks of decoder layers, layer by layer, replicated to about model shapes."""
    return [
        case
        for layer in layers
        for case in real(of_layer(layer), _NATURAL, tokens, dtype, seed, ops=(op,))
    ]
