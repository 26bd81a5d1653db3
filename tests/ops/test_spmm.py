"""spmm: output and stride order, long rows, hidden sizes and TF32.

test_nasty_cases.py has the cases of all ops.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

from rosa_kernels import CsrPattern
from rosa_kernels.strides import empty_like_order
from rosa_kernels.testing import LAYOUTS, uniform_pattern

pytestmark = pytest.mark.ops("spmm")


def test_the_formula_on_whole_numbers(kernel: Served) -> None:
    """c = S b, worked out by hand."""
    pattern = CsrPattern.from_mask(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]))
    values = torch.tensor([2.0, -1.0, 3.0], device=kernel.device)
    b = torch.tensor([[5.0, 6.0], [7.0, 8.0], [-1.0, 1.0]], device=kernel.device)
    values, b = values.to(kernel.dtype), b.to(kernel.dtype)
    got = kernel(pattern.to(kernel.device), values=values, b=b)
    assert got.tolist() == [[11.0, 11.0], [0.0, 0.0], [21.0, 24.0]]


@sweep(layout=LAYOUTS.keys())
def test_output_has_the_stride_order_of_b(
    kernel: Served, pattern: CsrPattern, layout: str, dtype: torch.dtype
) -> None:
    """A token-major b gives a token-major output without a copy."""
    inputs = inputs_of("spmm", pattern, 5, dtype, kernel.device)
    inputs["b"] = LAYOUTS[layout](inputs["b"])
    got = check(kernel, pattern, inputs)
    assert got.shape == (pattern.shape[0], 5)
    assert got.stride() == empty_like_order(inputs["b"], pattern.shape[0]).stride()


def test_token_major_b_gives_token_major_output(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of("spmm", pattern, 5, kernel.dtype, kernel.device)
    assert inputs["b"].T.is_contiguous()
    assert check(kernel, pattern, inputs).T.is_contiguous()


def test_empty_rows_give_zeros(kernel: Served, dtype: torch.dtype) -> None:
    """The kernel writes empty rows. They do not keep the old contents of the memory."""
    pattern = uniform_pattern(40, 30, 0.02)
    inputs = inputs_of("spmm", pattern, 17, dtype, kernel.device)
    empty = pattern.row_nnz.to(kernel.device) == 0
    assert bool(empty.any())
    for _ in range(3):
        # The memory that the allocator hands out next holds NaN.
        torch.full((40, 17), torch.nan, dtype=dtype, device=kernel.device)
        got = check(kernel, pattern, inputs)
        assert torch.equal(got[empty], torch.zeros_like(got[empty]))


def test_sums_over_long_rows_are_accurate(kernel: Served, dtype: torch.dtype) -> None:
    """A bad accumulation shows in long sums."""
    pattern = uniform_pattern(5, 4001, 0.75)
    check(kernel, pattern, inputs_of("spmm", pattern, 9, dtype, kernel.device))


@sweep(hidden=[2048, 3072, 11008], tokens=[1, 2, 8])
def test_hidden_sizes_of_models_are_served(
    hidden: int, tokens: int, kernel: Served, dtype: torch.dtype
) -> None:
    """Columns of b of this length need more shared memory than CUDA gives a kernel by default."""
    pattern = uniform_pattern(96, hidden, 0.004)
    check(kernel, pattern, inputs_of("spmm", pattern, tokens, dtype, kernel.device))


@pytest.mark.ops("spmm", dtypes=[torch.float32])
def test_float32_is_not_rounded_to_tf32(kernel: Served) -> None:
    """1 + 2**-12 has two bits more than TF32 holds, and its square needs them."""
    pattern = uniform_pattern(30, 64, 1.0)
    near_one = torch.full((64, 20), 1 + 2.0**-12, device=kernel.device)
    values = torch.full((pattern.nnz,), 1 + 2.0**-12, device=kernel.device)
    got = check(kernel, pattern, {"values": values, "b": near_one})
    assert bool((got != 64).all())
