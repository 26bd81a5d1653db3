"""spops, the kernels of RoSA's authors (github.com/IST-DASLab/spops), where they are installed.

Not a dependency, and not what `pip install spops` brings: that package is about astrophysics. The
calls take row-major matrices and upcast bfloat16 and float16 to float32 themselves, on the clock.
`csr_add` clones the dense matrix unless told to work in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from bench.contender import OP, Contender, Problem, Run, token_major

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTRIBUTES = ("spmm", "sddmm", "csr_add")


@cache
def _find() -> ModuleType | str:
    """The module, or why it cannot be used."""
    try:
        import spops
    except ImportError as error:
        return f"spops is not installed ({error})"
    missing = [name for name in _ATTRIBUTES if not hasattr(spops, name)]
    if missing:
        return f"the spops found here is another package: it has no {', '.join(missing)}"
    return spops


def _reject(problem: Problem) -> str | None:
    module = _find()
    if isinstance(module, str):
        return module
    if problem.device != "cpu":
        return f"its CPU calls are measured, got {problem.device}"
    if problem.case.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.case.dtype}"
    return None


def _reject_inplace(problem: Problem) -> str | None:
    if problem.case.dtype != torch.float32:
        return f"in place it drops every dtype but float32, got {problem.case.dtype}"
    return _reject(problem)


def _indices(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pattern = problem.pattern
    return pattern.crow_indices, pattern.row_swizzle, pattern.col_indices


def _spmm(problem: Problem, charge: str) -> Run:
    spmm = _find().spmm  # type: ignore[union-attr]
    values, indices, m = problem.inputs["values"], _indices(problem), problem.case.m
    b, dtype = problem.operands(charge)["b"], problem.case.dtype
    if charge == OP:
        return lambda: spmm(values, *indices, b, m, return_type=dtype)
    return lambda: token_major(spmm(values, *indices, b.contiguous(), m, return_type=dtype))


def _sddmm(problem: Problem, charge: str) -> Run:
    sddmm = _find().sddmm  # type: ignore[union-attr]
    indices, x = _indices(problem), problem.operands(charge)
    a, b, dtype = x["a"], x["b"], problem.case.dtype
    return lambda: sddmm(*indices, a.contiguous(), b.contiguous(), return_type=dtype)


def _csr_add(inplace: bool) -> Callable[[Problem, str], Run]:
    def prepare(problem: Problem, charge: str) -> Run:
        csr_add = _find().csr_add  # type: ignore[union-attr]
        values, indices, w = problem.inputs["values"], _indices(problem), problem.inputs["w"]
        w, dtype = w.clone() if inplace else w, problem.case.dtype
        return lambda: csr_add(values, *indices, w, inplace=inplace, return_type=dtype)

    return prepare


CONTENDERS = (
    Contender("spmm", "spops", "spops", _spmm, _reject),
    Contender("sddmm", "spops", "spops", _sddmm, _reject),
    Contender("csr_add_", "spops", "spops", _csr_add(inplace=False), _reject, charges=(OP,)),
    Contender(
        "csr_add_", "spops-inplace", "spops", _csr_add(inplace=True), _reject_inplace, charges=(OP,)
    ),
)
