"""Our SDDMM kernels of tiles under settings that are not their defaults, beside the defaults.

They take turns with the kernels as users get them, in the same cases. They are neither peers nor
kernels that "auto" could take: mode "experiment" keeps them out of every other table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from rosa_kernels.testing import Case

from . import ours
from .base import Contender, Problem, Run
from .overhead import is_overhead

T = TypeVar("T")

MODE = "experiment"
EARLY = "early"
_KERNELS = ("cuda/tile", "cuda/wgmma")
# What follows a kernel's name -> the environment, read at every call by cpp/src/cuda/device.cu.
# Without any: panels of 128 MiB, and launches that wait for each other.
SETTINGS: dict[str, dict[str, str]] = {
    "panels=32": {"ROSA_PANEL_MIB": "32", "ROSA_EARLY_LAUNCH": "0"},
    EARLY: {"ROSA_PANEL_MIB": "128", "ROSA_EARLY_LAUNCH": "1"},
    f"panels=32 {EARLY}": {"ROSA_PANEL_MIB": "32", "ROSA_EARLY_LAUNCH": "1"},
}


def contenders(case: Case, device: str) -> list[Contender]:
    """Every kernel of tiles under every setting; none where a case or device has no such kernel."""
    if case.op != "sddmm" or device != "cuda" or is_overhead(case):
        return []
    return [
        with_settings(base, suffix, settings)
        for base in ours.contenders(case, device)
        if base.name in _KERNELS
        for suffix, settings in SETTINGS.items()
    ]


def kernel_of(name: str) -> str:
    """cuda/tile for "cuda/tile panels=32"; any other name as it is."""
    return name.split(" ")[0]


def with_settings(base: Contender, suffix: str, settings: Mapping[str, str]) -> Contender:
    """A contender whose calls see the settings in their environment, and nobody else's do."""

    def prepare(problem: Problem, charge: str) -> Run:
        return _within(settings, base.prepare(problem, charge))

    def workspace(problem: Problem) -> int | None:
        return _within(settings, lambda: base.workspace(problem))()

    return replace(
        base, name=f"{base.name} {suffix}", prepare=prepare, workspace=workspace, mode=MODE
    )


def _within(settings: Mapping[str, str], call: Callable[[], T]) -> Callable[[], T]:
    def run() -> T:
        with _environment(settings):
            return call()

    return run


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
