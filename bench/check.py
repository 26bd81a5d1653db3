"""Correct before fast: the float64 oracle on a part of a case that is cheap and hard to fool."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contender import Problem
from rosa_kernels import CsrPattern
from rosa_kernels.testing import assert_within_bound, oracle

# Float64 terms behind the rows that are checked: products, or elements of rows of a dense matrix.
# A 4096 x 4096 case at 5 % and 2048 tokens has 1.7e9 in all, half a minute; 4M take 0.1 s.
TERMS = 2**22


class Check:
    """The accuracy policy of rosa_kernels.testing on a few rows, NaN and shape on all.

    Checked are the first, the last and the fullest row, and rows drawn at random until `terms` is
    spent: all rows if it suffices. Every token counts in each of them.
    """

    def __init__(self, problem: Problem, terms: int = TERMS) -> None:
        self.op = problem.case.op
        pattern = problem.pattern
        self._out_shape = _out_shape(problem)
        self.rows = _choose_rows(problem, terms)
        entries = _entries(pattern, self.rows)
        self._picked = entries if self.op in ("sddmm", "csr_gather") else self.rows
        crow = torch.zeros(len(self.rows) + 1, dtype=torch.int64)
        crow[1:] = pattern.row_nnz.cpu()[self.rows].cumsum(0)
        col = pattern.col_indices.cpu()[entries]
        part = CsrPattern(crow, col, (len(self.rows), problem.case.n))
        self._inputs = {
            name: _part(name, x.cpu(), self.rows, entries) for name, x in problem.inputs.items()
        }
        self._ref, self._scale, self._terms = oracle(self.op, part, self._inputs)
        self.complete = len(self.rows) == problem.case.m

    def __call__(self, got: Tensor) -> float:
        """The largest relative error |got - ref| / (||a o b||_2 + |ref|) over the checked rows.

        Raises:
            AssertionError: wrong shape, a NaN anywhere, or an element outside the bound.
        """
        got = got.detach()
        if tuple(got.shape) != self._out_shape:
            raise AssertionError(
                f"{self.op}: expected shape {self._out_shape}, got {tuple(got.shape)}"
            )
        if bool(got.isnan().any()):
            raise AssertionError(f"{self.op}: expected no NaN, got {int(got.isnan().sum())}")
        got = got.cpu()[self._picked]
        assert_within_bound(self.op, got, self._ref, self._scale, self._terms, self._inputs)
        size = self._scale + self._ref.abs()
        error = (got.double() - self._ref).abs() / torch.where(size > 0, size, 1.0)
        return float(error.max()) if error.numel() else 0.0


def _choose_rows(problem: Problem, terms: int) -> Tensor:
    case, counts = problem.case, problem.pattern.row_nnz.cpu()
    if case.op in ("sddmm", "spmm"):
        cost = counts.long() * case.k
    else:
        cost = torch.full((case.m,), 4 * case.n)
    if case.m == 0 or int(cost.sum()) <= terms:
        return torch.arange(case.m)
    order = torch.randperm(case.m, generator=torch.Generator().manual_seed(case.seed))
    affordable = int((cost[order].cumsum(0) <= terms).sum())
    always = torch.tensor([0, case.m - 1, int(counts.argmax())])
    return torch.unique(torch.cat([always, order[:affordable]]))


def _entries(pattern: CsrPattern, rows: Tensor) -> Tensor:
    """Positions of the entries of `rows` among all entries."""
    wanted = torch.zeros(pattern.shape[0], dtype=torch.bool)
    wanted[rows] = True
    return wanted[pattern.row_indices.cpu().long()].nonzero().flatten()


def _part(name: str, x: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
    if name in ("a", "w"):
        return x[rows]
    return x[entries] if name == "values" else x


def _out_shape(problem: Problem) -> tuple[int, ...]:
    case = problem.case
    if case.op == "spmm":
        return (case.m, case.k)
    if case.op in ("csr_add", "csr_add_"):
        return (case.m, case.n)
    return (problem.pattern.nnz,)
