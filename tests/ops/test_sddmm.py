"""sddmm: output, out_dtype, long sums and TF32. test_nasty_cases.py has the cases of all ops."""

from __future__ import annotations

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

from rosa_kernels import CsrPattern
from rosa_kernels.testing import uniform_pattern

pytestmark = pytest.mark.ops("sddmm")


def test_the_formula_on_whole_numbers(kernel: Served) -> None:
    """values[t] = <a[i_t], b[j_t]>, worked out by hand."""
    pattern = CsrPattern.from_mask(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]))
    a = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]], device=kernel.device)
    b = torch.tensor([[5.0, 6.0], [7.0, 8.0], [-1.0, 1.0]], device=kernel.device)
    got = kernel(pattern.to(kernel.device), a=a.to(kernel.dtype), b=b.to(kernel.dtype))
    assert got.tolist() == [17.0, 1.0, 53.0]


def test_shape_and_strides_of_the_output(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    got = check(kernel, pattern, inputs_of("sddmm", pattern, 5, dtype, kernel.device))
    assert got.shape == (pattern.nnz,)
    assert got.is_contiguous()
    assert not got.requires_grad


def test_no_tokens_give_zeros(kernel: Served, pattern: CsrPattern, dtype: torch.dtype) -> None:
    got = check(kernel, pattern, inputs_of("sddmm", pattern, 0, dtype, kernel.device))
    assert torch.equal(got, torch.zeros_like(got))


def test_out_dtype_of_the_operands_changes_nothing(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    inputs = inputs_of("sddmm", pattern, 5, dtype, kernel.device)
    explicit = check(kernel, pattern, inputs, out_dtype=dtype)
    assert torch.equal(explicit, kernel(pattern.to(kernel.device), **inputs))


def test_sums_over_many_tokens_are_accurate(kernel: Served, dtype: torch.dtype) -> None:
    """A bad accumulation shows in long sums."""
    pattern = uniform_pattern(9, 11, 0.4)
    check(kernel, pattern, inputs_of("sddmm", pattern, 3001, dtype, kernel.device))


@pytest.mark.ops("sddmm", dtypes=[torch.float32])
@sweep(seed=range(3))
def test_float32_is_not_rounded_to_tf32(kernel: Served, seed: int) -> None:
    """1 + 2**-12 has two bits more than TF32 holds, and its square needs them."""
    pattern = uniform_pattern(30, 40, 0.2, seed)
    near_one = torch.full((40, 64), 1 + 2.0**-12, device=kernel.device)
    got = check(kernel, pattern, {"a": near_one[:30], "b": near_one})
    assert bool((got != 64).all())


def test_parameters_give_a_plain_tensor(pattern: CsrPattern, kernel: Served) -> None:
    """Subclasses of Tensor are operands like any other."""
    inputs = inputs_of("sddmm", pattern, 5, kernel.dtype, kernel.device)
    wrapped = {name: torch.nn.Parameter(x) for name, x in inputs.items()}
    moved = pattern.to(kernel.device)
    got = kernel(moved, **wrapped)
    assert type(got) is torch.Tensor
    assert torch.equal(got, kernel(moved, **inputs))
