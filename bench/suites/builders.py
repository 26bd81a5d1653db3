"""Functions and constants that the suites are built from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from rosa_kernels.testing import Case

from .. import masks
from ..measuring.names import OPS, PRODUCTS

ROSA_DENSITY = 0.006
DECODE_TOKENS = (1, 16, 64, 4, 8, 32, 2)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Shape = tuple[int, int]

# (m, n) of the linear layers of one decoder layer.
MODELS: dict[str, dict[str, Shape]] = {
    "SmolLM2-135M": {
        **dict.fromkeys(("q_proj", "o_proj"), (576, 576)),
        **dict.fromkeys(("k_proj", "v_proj"), (192, 576)),
        **dict.fromkeys(("gate_proj", "up_proj"), (1536, 576)),
        "down_proj": (576, 1536),
    },
    "Llama-2-7B": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
        **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
        "down_proj": (4096, 11008),
    },
    # Mistral-7B's layers have the same shapes.
    "Llama-3-8B, Mistral-7B": {
        **dict.fromkeys(("q_proj", "o_proj"), (4096, 4096)),
        **dict.fromkeys(("k_proj", "v_proj"), (1024, 4096)),
        **dict.fromkeys(("gate_proj", "up_proj"), (14336, 4096)),
        "down_proj": (4096, 14336),
    },
}


def sweep(
    op: str,
    names: Iterable[str],
    shape: Shape,
    tokens: Sequence[int],
    densities: Sequence[float],
    dtype: torch.dtype,
    seed: int,
) -> list[Case]:
    """One case per mask, density and number of tokens.

    The number of tokens varies fastest, so that the cases of a mask are neighbours and it is drawn
    once.
    """
    return [
        Case(op, *shape, k, density, dtype, mask, seed)
        for mask in names
        for density in densities
        for k in tokens
    ]


def elementwise(
    names: Iterable[str],
    shape: Shape,
    densities: Sequence[float],
    dtype: torch.dtype,
    seed: int,
) -> list[Case]:
    """Cases of the ops on a dense weight."""
    return [
        Case(op, *shape, 1, density, dtype, mask, seed)
        for mask in names
        for density in densities
        for op in OPS
        if op not in PRODUCTS
    ]


def real(
    names: Iterable[str],
    shapes: dict[str, Sequence[Shape]] | None,
    tokens: Sequence[int],
    dtype: torch.dtype,
    seed: int,
    ops: Sequence[str] = PRODUCTS,
) -> list[Case]:
    """Cases on real masks. A uniform mask comes before the real masks of its shape and density.

    `shapes` gives the approximate shapes that the masks of each kind of layer are replicated to.
    With None the masks keep their own shapes.
    """
    found: dict[tuple[int, int, float], list[str]] = {}
    for name in names:
        pattern = masks.real(name)
        kind = name.split(".")[1]
        for shape in [pattern.shape] if shapes is None else shapes[kind]:
            m, n = _multiple(pattern.shape, shape)
            found.setdefault((m, n, round(pattern.density, 6)), []).append(f"real:{name}")
    return [
        Case(op, m, n, k, density, dtype, mask, seed)
        for (m, n, density), chosen in found.items()
        for mask in ("uniform", *chosen)
        for op in ops
        for k in tokens
    ]


def of_layer(layer: int) -> Iterator[str]:
    """The names of the real masks of a decoder layer."""
    return (f"{layer}.{kind}" for kind in masks.KINDS)


def _multiple(own: Shape, wanted: Shape) -> Iterator[int]:
    return (size * max(round(about / size), 1) for size, about in zip(own, wanted, strict=True))
