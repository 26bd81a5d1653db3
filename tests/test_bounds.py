"""Ranges of arguments, with the values that are easily let through by mistake."""

from __future__ import annotations

import numpy as np
import pytest

from rosa_kernels import bounds
from rosa_kernels.bounds import Bound

ODD = [True, False, np.bool_(True), None, "1", [1], 1j, float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (bounds.POSITIVE_INTEGER, [1, np.int8(1), 2**63 - 1], [0, -1, 1.0, np.float64(1), 2**63]),
        (bounds.NON_NEGATIVE_INTEGER, [0, np.uint64(3)], [-1, np.int64(-1), 0.0]),
        (bounds.FINITE, [0, -1, 1e308, np.float32(-1)], [10**400, np.float32("nan")]),
        (bounds.POSITIVE, [1, 1e-300, np.float16(1)], [0, -0.0, np.float32(0), 10**400]),
        (bounds.NON_NEGATIVE, [0, -0.0, 1e30], [-1, -1e-300]),
        (bounds.FRACTION, [0, 0.5, 1], [-0.1, 1.1]),
        (bounds.FRACTION_BELOW_1, [0, 0.0, np.float32(0.5)], [-0.1, 1, 1.0]),
        (bounds.OPEN_FRACTION, [1e-300, 0.5], [0, 0.0, 1, 1.0]),
    ],
    ids=lambda given: given.words if isinstance(given, Bound) else "",
)
def test_bounds_hold_inside_only(bound: Bound, inside: list, outside: list) -> None:
    assert [value for value in inside if not bound.holds(value)] == []
    assert [value for value in [*outside, *ODD] if bound.holds(value)] == []


def test_numbers_of_numpy_become_python_numbers() -> None:
    # JSON, to which options are written, holds no others.
    assert type(bounds.POSITIVE.check("op", np.float32(0.5))) is float
    assert type(bounds.POSITIVE_INTEGER.check("op", np.int64(3))) is int


def test_an_error_names_what_was_expected_and_got() -> None:
    with pytest.raises(ValueError, match=r"^--seed: expected an integer >= 0, got -1$"):
        bounds.NON_NEGATIVE_INTEGER.check("--seed", -1)
    with pytest.raises(ValueError, match=r"^op: expected alpha to be a number > 0, got '1'$"):
        bounds.POSITIVE.check("op", "1", "alpha")
