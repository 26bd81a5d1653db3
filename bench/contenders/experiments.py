"""Our tile SDDMM kernels with settings that are not their defaults.

They take turns with the default kernels in the same cases. They are neither peers nor kernels that
"auto" could take. Their mode "experiment" keeps them out of every other table.
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
# Suffix of the kernel's name -> environment variables, which cpp/src/cuda/device.cu reads at every
# call. The defaults are panels of 128 MiB, and launches that wait for each other.
SETTINGS: dict[str, dict[str, str]] = {
    "panels=32": {"ROSA_PANEL_MIB": "32", "ROSA_EARLY_LAUNCH": "0"},
    EARLY: {"ROSA_PANEL_MIB": "128", "ROSA_EARLY_LAUNCH": "1"},
    f"panels=32 {EARLY}": {"ROSA_PANEL_MIB": "32", "ROSA_EARLY_LAUNCH": "1"},
}


def contenders(case: Case, device: str) -> list[Contender]:
    """Every tile kernel with every setting. Empty if the case or the device has no tile kernel."""
    if case.op != "sddmm" or device != "cuda" or is_overhead(case):
        return []
    return [
        with_settings(base, suffix, settings)
        for base in ours.contenders(case, device)
        if base.name in _KERNELS
        for suffix, settings in SETTINGS.items()
    ]


def kernel_of(name: str) -> str:
    """The name without its suffix: cuda/tile for "cuda/tile panels=32"."""
    return name.split(" ")[0]


def with_settings(base: Contender, suffix: str, settings: Mapping[str, str]) -> Contender:
    """A contender whose calls, and no others, see the settings in the environment."""

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
