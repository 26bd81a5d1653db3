"""scipy and numpy on one thread: the baseline that most Python installations have.

scipy has no SDDMM. The fastest simple one loops over the rows of the pattern. It gathers the rows
of b that a row's entries name, and takes their dot products with the row of a. This takes 139 ms at
1 % and 536 ms at 5 %. An einsum over gathered pairs of rows takes 160 and 772 ms. The products use
vecdot, although GEMV is a tenth faster. numpy's BLAS threads spin for 100 ms after a GEMV, which
would slow down the next contender.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from ..measuring.names import FROM_TOKEN_MAJOR, OP
from .base import Contender, Problem, Run, token_major

_DTYPES = (torch.float32, torch.float64)


def _reject_numpy(problem: Problem) -> str | None:
    if problem.case.dtype not in _DTYPES:
        return f"numpy's products take float32 and float64, got {problem.case.dtype}"
    return None


def _reject_scipy(problem: Problem) -> str | None:
    if find_spec("scipy") is None:
        return "scipy is not installed"
    return _reject_numpy(problem)


def _spmm(problem: Problem, charge: str) -> Run:
    import scipy.sparse

    pattern, b = problem.pattern, problem.operands(charge)["b"].numpy()
    s = scipy.sparse.csr_array(
        (
            problem.inputs["values"].numpy(),
            pattern.col_indices.numpy(),
            pattern.crow_indices.numpy(),
        ),
        shape=pattern.shape,
    )
    if charge == OP:
        return lambda: torch.from_numpy(s @ b)
    return lambda: token_major(torch.from_numpy(s @ np.ascontiguousarray(b)))


def _sddmm(problem: Problem, charge: str) -> Run:
    crow, col = problem.pattern.crow_indices.numpy(), problem.pattern.col_indices.numpy()
    x = problem.operands(charge)
    rows = np.flatnonzero(np.diff(crow)).tolist()

    def run() -> torch.Tensor:
        a, b = (np.ascontiguousarray(x[name].numpy()) for name in ("a", "b"))
        out = np.empty(len(col), a.dtype)
        for i in rows:
            entries = slice(crow[i], crow[i + 1])
            np.vecdot(b[col[entries]], a[i], out=out[entries])
        return torch.from_numpy(out)

    return run


def _add_(problem: Problem, charge: str) -> Run:
    w = problem.inputs["w"].clone()
    flat, values = problem.flat.numpy(), problem.inputs["values"].numpy()
    target = w.numpy().reshape(-1)

    def run() -> torch.Tensor:
        np.add.at(target, flat, values)  # 0.3 ms at 1 %; `target[flat] += values` takes 0.9
        return w

    return run


def _put(problem: Problem, charge: str) -> Run:
    w = problem.inputs["w"].clone()
    flat, values = problem.flat.numpy(), problem.inputs["values"].numpy()
    target = w.numpy().reshape(-1)

    def run() -> torch.Tensor:
        target[flat] = values
        return w

    return run


def _take(problem: Problem, charge: str) -> Run:
    w, flat = problem.inputs["w"].numpy().reshape(-1), problem.flat.numpy()
    return lambda: torch.from_numpy(w.take(flat))


_CPU = frozenset({"cpu"})
CONTENDERS = tuple(
    Contender(op, package, package, prepare, reject, devices=_CPU, charges=charges)
    for op, package, prepare, reject, charges in (
        ("spmm", "scipy", _spmm, _reject_scipy, (OP, FROM_TOKEN_MAJOR)),
        ("sddmm", "numpy", _sddmm, _reject_numpy, (OP, FROM_TOKEN_MAJOR)),
        ("csr_add_", "numpy", _add_, _reject_numpy, (OP,)),
        ("csr_scatter_", "numpy", _put, _reject_numpy, (OP,)),
        ("csr_gather", "numpy", _take, _reject_numpy, (OP,)),
    )
)
