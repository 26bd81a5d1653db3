"""The plan of a run: the suites, devices and contenders that its arguments select."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from rosa_kernels.testing import Case

from ..contenders import experiments
from ..contenders.base import Contender
from ..layer.contenders import LayerContender
from ..measuring.console import UsageError
from ..suites.cases import contenders, suite

Entry = tuple[Case, list[Contender | LayerContender]]


@dataclass(frozen=True)
class Part:
    """One suite on one device."""

    device: str
    suite: str
    plan: list[Entry]


def parts(args: argparse.Namespace) -> list[Part]:
    """The nonempty parts that the arguments select, in the order given.

    Raises:
        UsageError: the machine lacks a device, no contender has a given name, or nothing is left.
    """
    found = []
    known: dict[str, None] = {}
    for device in _devices(args.device):
        for name in args.suite:
            part = Part(device, name, [])
            for case in suite(name, args.seed, device):
                competing = contenders(case, device)
                known |= dict.fromkeys(c.name for c in competing)
                if args.experiments:
                    competing = [*competing, *experiments.contenders(case, device)]
                competing = [c for c in competing if _wanted(c.name, args)]
                if competing and (not args.ops or case.op in args.ops):
                    part.plan.append((case, competing))
            if part.plan:
                found.append(part)
    for option, names in (("--kernels", args.kernels), ("--without", args.without)):
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise UsageError(
                f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}"
            )
    if not found:
        names = " or ".join(args.suite)
        raise UsageError(
            f"run: expected filters that match a case and contender of {names}, got none"
        )
    return found


def _wanted(name: str, args: argparse.Namespace) -> bool:
    name = experiments.kernel_of(name)
    return (not args.kernels or name in args.kernels) and name not in (args.without or ())


def _devices(asked: str) -> list[str]:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UsageError("--device: expected a machine with CUDA, got none")
    if asked == "auto":
        return ["cuda", "cpu"] if available else ["cpu"]
    return [asked]
