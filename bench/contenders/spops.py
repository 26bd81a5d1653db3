"""spops, the kernels of RoSA's authors (github.com/IST-DASLab/spops), if they are installed.

spops is not a dependency. `pip install spops` installs another package, about astrophysics. The
calls take row-major matrices. They upcast bfloat16 and float16 to float32 themselves, and this is
timed. `csr_add` clones the dense matrix unless it is told to work in place.

On CUDA the products are Sputnik's float32 kernels. sddmm has two backends. "structure_aware" trims
the grid to the mask and takes int16 indices. At every call it waits until the device has computed
the mask's sizes. "sputnik" does none of this. Their byte offsets into a matrix are 32 bits wide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..measuring.names import OP
from .base import Contender, Problem, Run, token_major

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTRIBUTES = ("spmm", "sddmm", "csr_add")
_INT16, _INT32 = 2**15 - 1, 2**31 - 1


@cache
def _find() -> ModuleType | str:
    """The module, or the reason why it cannot be used."""
    try:
        import spops
    except ImportError as error:
        return f"spops is not installed ({error})"
    missing = [name for name in _ATTRIBUTES if not hasattr(spops, name)]
    if missing:
        return f"the spops found here is another package: it has no {', '.join(missing)}"
    return spops


@cache
def _cuda_missing() -> str | None:
    try:
        import spops_backend  # noqa: F401
    except ImportError as error:
        return f"spops was built without CUDA ({error})"
    return None


def _reject(problem: Problem) -> str | None:
    module = _find()
    if isinstance(module, str):
        return module
    if problem.case.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.case.dtype}"
    if problem.device == "cpu":
        return None
    case = problem.case
    if case.op in ("sddmm", "spmm") and max(case.m, case.n) * case.k * 4 > _INT32:
        return f"its byte offsets are 32 bits wide, got a matrix of {max(case.m, case.n)}x{case.k}"
    return _cuda_missing()


def _reject_int16(problem: Problem) -> str | None:
    """As _reject, for kernels with 16-bit indices on CUDA: larger indices would wrap silently."""
    largest = max(problem.case.m, problem.case.n) - 1
    if problem.device == "cuda" and largest > _INT16:
        return f"its indices are 16 bits wide, got {largest}"
    return _reject(problem)


def _reject_inplace(problem: Problem) -> str | None:
    if problem.device == "cpu" and problem.case.dtype != torch.float32:
        return f"in place it works for float32 only, got {problem.case.dtype}"
    return _reject_int16(problem)


def _indices(problem: Problem, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, Tensor]:
    pattern = problem.pattern
    return pattern.crow_indices, pattern.row_swizzle.to(dtype), pattern.col_indices.to(dtype)


def _short(problem: Problem) -> torch.dtype:
    return torch.int16 if problem.device == "cuda" else torch.int32


def _spmm(problem: Problem, charge: str) -> Run:
    spmm = _find().spmm  # type: ignore[union-attr]
    values, indices, m = problem.inputs["values"], _indices(problem), problem.case.m
    b, dtype = problem.operands(charge)["b"], problem.case.dtype
    if charge == OP:
        return lambda: spmm(values, *indices, b, m, return_type=dtype)
    return lambda: token_major(spmm(values, *indices, b.contiguous(), m, return_type=dtype))


def _sddmm(backend: str | None) -> Callable[[Problem, str], Run]:
    """SDDMM by a backend of spops; None is the default of spops on either device."""

    def prepare(problem: Problem, charge: str) -> Run:
        sddmm = _find().sddmm  # type: ignore[union-attr]
        index = _short(problem) if backend is None else torch.int32
        indices, x = _indices(problem, index), problem.operands(charge)
        a, b, options = x["a"], x["b"], {"backend": backend, "return_type": problem.case.dtype}
        return lambda: sddmm(*indices, a.contiguous(), b.contiguous(), **options)

    return prepare


def _csr_add(inplace: bool) -> Callable[[Problem, str], Run]:
    def prepare(problem: Problem, charge: str) -> Run:
        csr_add = _find().csr_add  # type: ignore[union-attr]
        values, w = problem.inputs["values"], problem.inputs["w"]
        indices = _indices(problem, _short(problem))
        w, dtype = w.clone() if inplace else w, problem.case.dtype
        return lambda: csr_add(values, *indices, w, inplace=inplace, return_type=dtype)

    return prepare


CONTENDERS = (
    Contender("spmm", "spops", "spops", _spmm, _reject),
    Contender("sddmm", "spops", "spops", _sddmm(None), _reject_int16),
    Contender(
        "sddmm",
        "spops-sputnik",
        "spops",
        _sddmm("sputnik"),
        _reject,
        devices=frozenset({"cuda"}),
    ),
    Contender("csr_add_", "spops", "spops", _csr_add(False), _reject_int16, charges=(OP,)),
    Contender("csr_add_", "spops-inplace", "spops", _csr_add(True), _reject_inplace, charges=(OP,)),
)
