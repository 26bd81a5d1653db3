"""The cost of an op's call in addition to its kernel: validation, dispatch, autograd.

The pattern is so small that the kernel takes a few microseconds. The same kernel is called in three
ways that take turns: by its bare adapter, by the op without grad, and by the op with inputs that
require grad. The last is forward only, which records the graph. The overhead is the difference of
the medians.
"""

from __future__ import annotations

import torch

from rosa_kernels.testing import Case

from ..measuring.names import OP
from . import ours
from .base import Contender, Problem, Run

_SIZE, _TOKENS = 32, 8


def overhead_cases(seed: int = 0) -> list[Case]:
    """One tiny case per op."""
    return [
        Case(op, _SIZE, _SIZE, _TOKENS, 1 / _SIZE, torch.float32, "uniform", seed)
        for op in ("sddmm", "spmm", "csr_add_", "csr_gather")
    ]


def is_overhead(case: Case) -> bool:
    """Whether a case is one of `overhead_cases`."""
    return case in overhead_cases(case.seed)


def overhead_contenders(case: Case) -> list[Contender]:
    """The selected kernel's adapter, the op without grad, the op with grad."""
    modes = {
        "adapter": lambda problem, charge: ours.adapter_call(problem),
        "no_grad": lambda problem, charge: ours.op_call(problem, "auto"),
        "grad": _grad_call,
    }
    if case.op == "csr_add_":  # torch allows no backward formula for a mutating op
        del modes["grad"]
    return [
        Contender(
            case.op,
            "auto",
            "auto",
            prepare,
            token_major=True,
            mode=mode,
            serves=lambda problem: ours.selected(problem).name,
            charges=(OP,),
        )
        for mode, prepare in modes.items()
    ]


def _grad_call(problem: Problem, charge: str) -> Run:
    inputs = {name: x.detach().requires_grad_() for name, x in problem.inputs.items()}
    return ours.op_call(Problem(problem.case, problem.device, problem.pattern, inputs), "auto")
