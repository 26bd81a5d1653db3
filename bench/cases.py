"""What is measured: the suites, and which contenders meet in each of their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench import baselines, masks, ours
from bench.contender import Contender
from bench.overhead import overhead_cases, overhead_contenders
from rosa_kernels.testing import Case

PRODUCTS = ("sddmm", "spmm")
# RoSA papers train 0.1 to 2 %; 5 % shows where dense starts to win.
DENSITIES = (0.001, 0.003, 0.005, 0.01, 0.02, 0.05)
ROSA_DENSITY = 0.006


def _quick(seed: int) -> list[Case]:
    """Enough for every plot in three minutes on two cores: mostly 1024 tokens, not 2048."""
    f32, bf16 = torch.float32, torch.bfloat16
    cases = overhead_cases(seed) + _elementwise(("uniform", "q_proj"), (ROSA_DENSITY,), f32, seed)
    cases += _real([f"14.{kind}" for kind in masks.KINDS], 2048, f32, seed)
    cases += [
        Case(op, 4096, 4096, k, 0.01, dtype, mask, seed)
        for mask in ("uniform", "q_proj")
        for k, dtype in ((2048, f32), (1024, bf16))
        for op in PRODUCTS
    ]
    # Densities outermost: if the time budget ends it, both masks have their curves so far.
    cases += [
        Case(op, 4096, 4096, 1024, density, f32, mask, seed)
        for density in (0.001, 0.003, 0.01, 0.02, 0.05)
        for mask in ("uniform", "q_proj")
        for op in PRODUCTS
    ]
    return cases


def _rosa(seed: int) -> list[Case]:
    """The 21 real masks at their own shapes and replicated to about 4096, beside uniform ones."""
    names = list(masks.real_names())
    cases = _real(names, 2048, torch.float32, seed)
    cases += _real(names, 2048, torch.bfloat16, seed)
    return cases + _real(names, 2048, torch.float32, seed, width=4096)


def _density(seed: int) -> list[Case]:
    """4096 x 4096, 2048 tokens: uniform and generated masks over density."""
    cases = [
        Case(op, 4096, 4096, 2048, density, dtype, mask, seed)
        for dtype, chosen in (
            (torch.float32, ("uniform", *masks.KINDS)),
            (torch.bfloat16, ("uniform", "q_proj", "down_proj")),
        )
        for mask in chosen
        for density in DENSITIES
        for op in PRODUCTS
    ]
    cases += _elementwise(("uniform", "q_proj"), (0.001, ROSA_DENSITY, 0.05), torch.float32, seed)
    cases += _elementwise(("uniform", "q_proj"), (ROSA_DENSITY,), torch.bfloat16, seed)
    return cases + overhead_cases(seed)


SUITES: dict[str, Callable[[int], list[Case]]] = {
    "quick": _quick,
    "rosa": _rosa,
    "density": _density,
    "overhead": overhead_cases,
}


def suite(name: str, seed: int = 0) -> list[Case]:
    """The cases of a suite. Cases of one mask are neighbours, so that it is built once."""
    if name not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name](seed)


def contenders(case: Case) -> list[Contender]:
    """All that compete in a case: every registered kernel, what "auto" takes, and the peers."""
    if case in overhead_cases(case.seed):
        return overhead_contenders(case)
    return [*ours.contenders(case), *baselines.contenders(case)]


def pairs(name: str, seed: int = 0) -> Iterator[tuple[Case, Contender]]:
    """Every (case, contender) of a suite; the command line and pytest-benchmark iterate these."""
    for case in suite(name, seed):
        for contender in contenders(case):
            yield case, contender


def case_id(case: Case) -> str:
    """The name of a case in results: everything that defines it."""
    return (
        f"{case.op}/{case.mask}/{case.m}x{case.n}/k{case.k}/"
        f"{case.density:g}/{dtype_name(case.dtype)}/{case.seed}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _real(
    names: list[str], k: int, dtype: torch.dtype, seed: int, width: int | None = None
) -> list[Case]:
    """Real masks, replicated to about `width`; those of one shape follow a uniform mask of it."""
    by_shape: dict[tuple[int, int, float], list[str]] = {}
    for name in names:
        pattern = masks.real(name)
        m, n = pattern.shape
        if width is not None:
            m, n = m * round(width / m), n * round(width / n)
        by_shape.setdefault((m, n, round(pattern.density, 6)), []).append(f"real:{name}")
    return [
        Case(op, m, n, k, density, dtype, mask, seed)
        for (m, n, density), real in by_shape.items()
        for mask in ("uniform", *real)
        for op in PRODUCTS
    ]


def _elementwise(
    names: tuple[str, ...], densities: tuple[float, ...], dtype: torch.dtype, seed: int
) -> list[Case]:
    return [
        Case(op, 4096, 4096, 1, density, dtype, mask, seed)
        for mask in names
        for density in densities
        for op in ("csr_add_", "csr_gather")
    ]
