"""Arguments that CsrPattern refuses, with the error and its message."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from rosa_kernels import CsrPattern
from rosa_kernels.testing import uniform_pattern

HUGE = 2**31


def csr(crow: object, col: object, shape: object = (3, 4)) -> Callable[[], CsrPattern]:
    crow = torch.tensor(crow) if isinstance(crow, list) else crow
    col = torch.tensor(col) if isinstance(col, list) else col
    return lambda: CsrPattern(crow, col, shape)


def coo(rows: list[int], cols: list[int], shape: object = (3, 4)) -> Callable[[], CsrPattern]:
    return lambda: CsrPattern.from_coo(torch.tensor(rows), torch.tensor(cols), shape)


ZERO = torch.zeros(1, dtype=torch.int32)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "float rows": (
        csr([0.0, 1.0, 1.0, 1.0], [0]),
        TypeError,
        "expected crow_indices of dtype int32 or int64, got torch.float32",
    ),
    "bool columns": (
        csr([0, 1, 1, 1], [True]),
        TypeError,
        "expected col_indices of dtype int32 or int64, got torch.bool",
    ),
    "no tensor": (
        lambda: CsrPattern([0, 1, 1, 1], ZERO, (3, 4)),
        TypeError,
        "expected crow_indices to be a tensor, got list",
    ),
    "2-D rows": (
        csr([[0, 1, 1, 1]], [0]),
        ValueError,
        "expected crow_indices to be 1-D, got shape (1, 4)",
    ),
    "0-D columns": (
        csr([0, 1, 1, 1], torch.tensor(0)),
        ValueError,
        "expected col_indices to be 1-D, got shape ()",
    ),
    "short rows": (
        csr([0, 1, 1], [0]),
        ValueError,
        "expected crow_indices of length m + 1 = 4, got 3",
    ),
    "no rows": (
        csr(torch.zeros(0, dtype=torch.int32), [0]),
        ValueError,
        "expected crow_indices of length m + 1 = 4, got 0",
    ),
    "nnz too great": (
        csr([0, 1, 1, 2], [0]),
        ValueError,
        "expected crow_indices to run from 0 to nnz = 1, got 0 to 2",
    ),
    "nnz too small": (
        csr([0, 0, 1, 1], [0, 1]),
        ValueError,
        "expected crow_indices to run from 0 to nnz = 2, got 0 to 1",
    ),
    "no zero": (
        csr([1, 1, 1, 1], [0]),
        ValueError,
        "expected crow_indices to run from 0 to nnz = 1, got 1 to 1",
    ),
    "falling rows": (
        csr([0, 2, 1, 2], [0, 1]),
        ValueError,
        "expected non-decreasing crow_indices, got 2 then 1 at row 1",
    ),
    "negative rows": (
        csr([0, -1, 1, 2], [0, 1]),
        ValueError,
        "expected non-decreasing crow_indices, got 0 then -1 at row 0",
    ),
    # In int32 the differences are 2**31 - 1, 2**31 - 1 and 3, so the rows look monotone.
    "rows that wrap in int32": (
        csr(torch.tensor([0, HUGE - 1, -2, 1], dtype=torch.int32), [0]),
        ValueError,
        "expected non-decreasing crow_indices, got 2147483647 then -2 at row 1",
    ),
    "int16 columns": (
        csr([0, 1, 1, 1], torch.tensor([0], dtype=torch.int16)),
        TypeError,
        "expected col_indices of dtype int32 or int64, got torch.int16",
    ),
    "shape of floats": (
        csr([0, 1, 1, 1], [0], (3.0, 4)),
        TypeError,
        "expected a shape (m, n) of integers, got (3.0, 4)",
    ),
    "shape of a number": (
        csr([0, 1, 1, 1], [0], 3),
        TypeError,
        "expected a shape (m, n) of integers, got 3",
    ),
    "mask of lists": (
        lambda: CsrPattern.from_mask([[1, 0]]),
        TypeError,
        "expected a dense tensor, got list",
    ),
    "sparse mask": (
        lambda: CsrPattern.from_mask(torch.eye(3).to_sparse()),
        TypeError,
        "expected a dense tensor, got torch.sparse_coo",
    ),
    "mask on meta": (
        lambda: CsrPattern.from_mask(torch.ones(2, 3, device="meta")),
        ValueError,
        "expected a mask with data, got one on meta",
    ),
    "no scipy matrix": (
        lambda: CsrPattern.from_scipy([[1, 0]]),
        TypeError,
        "expected a scipy sparse matrix, got list",
    ),
    "no torch matrix": (
        lambda: CsrPattern.from_torch([[1, 0]]),
        TypeError,
        "expected a tensor, got list",
    ),
    "negative column": (
        csr([0, 2, 2, 2], [-1, 3]),
        ValueError,
        "expected col_indices in [0, 4), got values from -1 to 3",
    ),
    "column out of range": (
        csr([0, 2, 2, 2], [0, 4]),
        ValueError,
        "expected col_indices in [0, 4), got values from 0 to 4",
    ),
    "column beyond int32": (
        csr([0, 2, 2, 2], [0, 2**32 + 1]),
        ValueError,
        "expected col_indices in [0, 4), got values from 0 to 4294967297",
    ),
    "column of a matrix without": (
        csr([0, 1, 1, 1], [0], (3, 0)),
        ValueError,
        "expected col_indices in [0, 0), got values from 0 to 0",
    ),
    "unsorted columns": (
        csr([0, 1, 1, 3], [0, 3, 1]),
        ValueError,
        "expected sorted, unique col_indices within each row, got unsorted columns 3, 1 in row 2",
    ),
    "repeated columns": (
        csr([0, 0, 2, 3], [3, 3, 1]),
        ValueError,
        "expected sorted, unique col_indices within each row, got repeated columns 3, 3 in row 1",
    ),
    "shape of three": (
        csr([0], [], (0, 1, 2)),
        ValueError,
        "expected a shape (m, n) of sizes >= 0, got (0, 1, 2)",
    ),
    "negative shape": (
        csr([0], [], (-1, 2)),
        ValueError,
        "expected a shape (m, n) of sizes >= 0, got (-1, 2)",
    ),
    "too many columns": (
        csr([0, 1], [0], (1, HUGE)),
        ValueError,
        "expected dimensions below 2**31 (indices are int32), got (1, 2147483648)",
    ),
    "too many rows": (
        csr(ZERO.expand(HUGE + 1), [0], (HUGE, 1)),
        ValueError,
        "expected dimensions below 2**31 (indices are int32), got (2147483648, 1)",
    ),
    "too many nonzeros": (
        csr(ZERO.expand(4), ZERO.expand(HUGE)),
        ValueError,
        "expected fewer than 2**31 entries in col_indices, got 2147483648",
    ),
    "mask too wide": (
        lambda: CsrPattern.from_mask(torch.zeros(1).expand(1, HUGE)),
        ValueError,
        "expected dimensions below 2**31 (indices are int32), got (1, 2147483648)",
    ),
    "3-D mask": (
        lambda: CsrPattern.from_mask(torch.zeros(1, 2, 3)),
        ValueError,
        "expected a 2-D mask, got shape (1, 2, 3)",
    ),
    "coo lengths": (
        coo([0, 1], [0]),
        ValueError,
        "expected rows and cols of one length, got 2 and 1",
    ),
    "coo row out of range": (
        coo([0, 3], [0, 1]),
        ValueError,
        "expected rows in [0, 3), got values from 0 to 3",
    ),
    "coo negative column": (
        coo([0, 1], [-2, 1]),
        ValueError,
        "expected cols in [0, 4), got values from -2 to 1",
    ),
    "coo repeated": (
        coo([1, 0, 1], [2, 1, 2]),
        ValueError,
        "got repeated columns 2, 2 in row 1",
    ),
    "coo too many columns": (
        coo([0], [0], (1, HUGE)),
        ValueError,
        "expected dimensions below 2**31 (indices are int32), got (1, 2147483648)",
    ),
    "torch layout": (
        lambda: CsrPattern.from_torch(torch.eye(3).to_sparse()),
        TypeError,
        "expected a 2-D tensor of layout torch.sparse_csr, got torch.sparse_coo of shape (3, 3)",
    ),
    "torch batch": (
        lambda: CsrPattern.from_torch(torch.ones(2, 3, 4).to_sparse_csr()),
        TypeError,
        "expected a 2-D tensor of layout torch.sparse_csr, got torch.sparse_csr of shape (2, 3, 4)",
    ),
    "values of a list": (
        lambda: uniform_pattern(4, 5, 0.5).to_torch([1.0]),
        TypeError,
        "expected a tensor, got list",
    ),
    "number of values": (
        lambda: uniform_pattern(4, 5, 0.5).to_torch(torch.ones(9)),
        ValueError,
        "expected values of shape (10,), got (9,)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad: str) -> None:
    build, error, message = BAD[bad]
    with pytest.raises(error, match=re.escape(message)) as raised:
        build()
    assert str(raised.value).startswith("CsrPattern")


def test_index_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="on one device, got meta and cpu"):
        CsrPattern(torch.zeros(4, dtype=torch.int32, device="meta"), ZERO, (3, 4))


@pytest.mark.parametrize("index", ["crow_indices", "col_indices"])
def test_writes_into_index_tensors_are_noticed(pattern: CsrPattern, index: str) -> None:
    pattern.check_unchanged()
    getattr(pattern, index)[0] = 0
    with pytest.raises(RuntimeError, match="got tensors changed in place since; build a new"):
        pattern.check_unchanged()
