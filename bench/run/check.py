"""Checks results against the float64 oracle, on rows that are cheap but hard to fool."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.testing import assert_within_bound, oracle

from ..contenders.base import Problem

# The limit on float64 terms behind the checked rows: products, or elements of rows of a dense
# matrix. A 4096 x 4096 case at 5 % and 2048 tokens has 1.7e9 terms, half a minute on a CPU; 4M take
# 0.1 s. In cases on a GPU the oracle runs there too, and 32M take a few milliseconds.
TERMS = {"cpu": 2**22, "cuda": 2**25}
# The fullest row of an SDDMM may have a thousand entries, each with all tokens. Only about this
# many entries of a row are checked.
_ENTRIES_PER_ROW = 64


class Check:
    """Checks a few rows by the accuracy policy of rosa_kernels.testing.

    All rows are checked for NaN, and the result for its shape.

    The checked rows are the first, the last, the fullest, and random ones until `terms` is spent.
    If `terms` suffices, all rows are checked. All tokens of a checked row are checked. The entries
    of an SDDMM are independent. Of a long row only some are checked: the first, the last, and
    others spread evenly between.
    """

    def __init__(self, problem: Problem, terms: int | None = None) -> None:
        self.op = problem.case.op
        pattern = problem.pattern
        self._out_shape = _out_shape(problem)
        if terms is None:
            terms = TERMS[problem.device]
        rows, self.complete = _choose_rows(problem, terms)
        self.rows = rows.cpu()
        entries = _entries(pattern, rows)
        if self.op == "sddmm" and not self.complete:
            entries = _thin(pattern, entries)
        by_entry = self.op in ("sddmm", "csr_gather")
        self._picked = entries if by_entry else rows
        part, columns = _sub_pattern(pattern, rows, entries)
        if self.op not in ("sddmm", "spmm"):  # the dense weight keeps its columns
            part, columns = _keep_columns(part, columns, problem.case.n), None
        self._inputs = {
            name: _part(name, x, rows, entries, columns) for name, x in problem.inputs.items()
        }
        self._ref, self._scale, self._terms = oracle(self.op, part, self._inputs)

    def __call__(self, got: Tensor) -> float:
        """The largest relative error |got - ref| / (||a o b||_2 + |ref|) over the checked rows.

        Raises:
            AssertionError: the shape is wrong, there is a NaN, or an element is outside the bound.
        """
        got = got.detach()
        if tuple(got.shape) != self._out_shape:
            raise AssertionError(
                f"{self.op}: expected shape {self._out_shape}, got {tuple(got.shape)}"
            )
        if bool(got.isnan().any()):
            raise AssertionError(f"{self.op}: expected no NaN, got {int(got.isnan().sum())}")
        got = got[self._picked]
        assert_within_bound(self.op, got, self._ref, self._scale, self._terms, self._inputs)
        size = self._scale + self._ref.abs()
        error = (got.double() - self._ref).abs() / torch.where(size > 0, size, 1.0)
        return float(error.max()) if error.numel() else 0.0


def _choose_rows(problem: Problem, terms: int) -> tuple[Tensor, bool]:
    """The rows to check, ascending, on the problem's device; and whether these are all rows."""
    case, counts = problem.case, problem.pattern.row_nnz
    if case.op in ("sddmm", "spmm"):
        cost = counts.long() * case.k
    else:
        cost = counts.new_full((case.m,), 4 * case.n, dtype=torch.int64)
    if case.m == 0 or int(cost.sum()) <= terms:
        return torch.arange(case.m, device=counts.device), True
    order = torch.randperm(case.m, generator=torch.Generator().manual_seed(case.seed))
    order = order.to(counts.device)
    affordable = int((cost[order].cumsum(0) <= terms).sum())
    always = torch.stack([order.new_tensor(0), order.new_tensor(case.m - 1), counts.argmax()])
    return torch.unique(torch.cat([always, order[:affordable]])), False


def _entries(pattern: CsrPattern, rows: Tensor) -> Tensor:
    """Positions of the entries of `rows` among all entries."""
    wanted = torch.zeros(pattern.shape[0], dtype=torch.bool, device=rows.device)
    wanted[rows] = True
    return wanted[pattern.row_indices.long()].nonzero().flatten()


def _thin(pattern: CsrPattern, entries: Tensor) -> Tensor:
    """At most about _ENTRIES_PER_ROW entries of each row, including its first and last."""
    row = pattern.row_indices[entries].long()
    place = entries - pattern.crow_indices[row]
    count = pattern.row_nnz[row]
    step = (count + _ENTRIES_PER_ROW - 1) // _ENTRIES_PER_ROW
    return entries[(place % step == 0) | (place == count - 1)]


def _sub_pattern(pattern: CsrPattern, rows: Tensor, entries: Tensor) -> tuple[CsrPattern, Tensor]:
    """The entries as a pattern over `rows` and the columns in use; and these columns."""
    columns, at = torch.unique(pattern.col_indices[entries], return_inverse=True)
    row = torch.searchsorted(rows, pattern.row_indices[entries].long())
    crow = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    crow[1:] = torch.bincount(row, minlength=len(rows)).cumsum(0)
    return CsrPattern(crow, at, (len(rows), len(columns))), columns.long()


def _keep_columns(part: CsrPattern, columns: Tensor, n: int) -> CsrPattern:
    return CsrPattern(part.crow_indices, columns[part.col_indices.long()], (part.shape[0], n))


def _part(name: str, x: Tensor, rows: Tensor, entries: Tensor, columns: Tensor | None) -> Tensor:
    if name in ("a", "w"):
        return x[rows]
    return x[entries] if name == "values" else x[columns]


def _out_shape(problem: Problem) -> tuple[int, ...]:
    case = problem.case
    if case.op == "spmm":
        return (case.m, case.k)
    if case.op in ("csr_add", "csr_add_", "csr_scatter_"):
        return (case.m, case.n)
    return (problem.pattern.nnz,)
