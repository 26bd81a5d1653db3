"""The cases of a suite, and the contenders of each case."""

from __future__ import annotations

from collections.abc import Iterator

from rosa_kernels.testing import Case

from ..contenders import ours, peers
from ..contenders.base import Contender
from ..contenders.overhead import is_overhead, overhead_contenders
from ..layer.case import LayerCase
from ..layer.contenders import LayerContender
from ..layer.contenders import contenders as layer_contenders
from ..measuring.names import dtype_name
from . import SUITES, cpu, cuda


def suite(name: str, seed: int = 0, device: str = "cpu") -> list[Case]:
    """The cases of a suite on a device without duplicates, the most informative first."""
    if name not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    build = getattr(cuda if device == "cuda" else cpu, name)
    return list(dict.fromkeys(build(seed)))


def contenders(case: Case, device: str = "cpu") -> list[Contender] | list[LayerContender]:
    """All contenders of a case: "auto", every registered kernel, and the peers."""
    if isinstance(case, LayerCase):
        return layer_contenders(case, device)
    if is_overhead(case):
        return overhead_contenders(case)
    return [*ours.contenders(case, device), *peers.contenders(case, device)]


def pairs(
    name: str, seed: int = 0, device: str = "cpu"
) -> Iterator[tuple[Case, Contender | LayerContender]]:
    """Every (case, contender) of a suite, for pytest-benchmark."""
    for case in suite(name, seed, device):
        for contender in contenders(case, device):
            yield case, contender


def case_id(case: Case) -> str:
    """The name of a case in results, made of everything that defines it."""
    name = (
        f"{case.op}/{case.mask}/{case.m}x{case.n}/k{case.k}/"
        f"{case.density:g}/{dtype_name(case.dtype)}/{case.seed}"
    )
    if isinstance(case, LayerCase):
        name += f"/r{case.rank}" + (f"/dropout{case.dropout:g}" if case.dropout else "")
    return name
