"""Every registered kernel of every op meets the accuracy policy in every nasty case."""

from __future__ import annotations

import pytest
import torch
from conftest import NARROW, SIZES, Served, check, inputs_of, sweep
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.strides import overlaps_itself
from rosa_kernels.testing import LAYOUTS, NASTY

REDUCING = ("sddmm", "spmm")
COPYING = ("csr_add", "csr_add_", "csr_gather", "csr_scatter_")
ALL = REDUCING + COPYING


@pytest.mark.ops(*REDUCING)
@sweep(nasty=NASTY, k=[0, 1, 33])
def test_products_on_nasty_patterns(kernel: Served, nasty: CsrPattern, k: int) -> None:
    check(kernel, nasty, inputs_of(kernel.op, nasty, k, kernel.dtype, kernel.device))


@pytest.mark.ops(*COPYING)
@sweep(nasty=NASTY)
def test_csr_ops_on_nasty_patterns(kernel: Served, nasty: CsrPattern, dtype: torch.dtype) -> None:
    check(kernel, nasty, inputs_of(kernel.op, nasty, 0, dtype, kernel.device))


@pytest.mark.ops(*REDUCING)
@sweep(k=SIZES)
def test_numbers_of_tokens_around_block_sizes(
    kernel: Served, pattern: CsrPattern, k: int, dtype: torch.dtype
) -> None:
    check(kernel, pattern, inputs_of(kernel.op, pattern, k, dtype, kernel.device))


@pytest.mark.ops(*REDUCING)
@sweep(size=SIZES[1:], form=["few rows", "few columns", "square and full"])
def test_pattern_sizes_around_block_sizes(kernel: Served, size: int, form: str) -> None:
    """Numbers of rows and columns are at and around each block size."""
    m, n, density = {
        "few rows": (size, 40, 0.3),
        "few columns": (40, size, 0.3),
        "square and full": (size, size, 1.0),
    }[form]
    generator = torch.Generator().manual_seed(size)
    pattern = CsrPattern.from_mask(torch.rand(m, n, generator=generator) < density)
    check(kernel, pattern, inputs_of(kernel.op, pattern, 5, kernel.dtype, kernel.device))


@pytest.mark.ops(*ALL)
@sweep(layout=LAYOUTS.keys())
def test_every_layout_of_every_operand(
    kernel: Served, pattern: CsrPattern, layout: str, dtype: torch.dtype
) -> None:
    """First all operands have the layout, then one operand at a time."""
    inputs = inputs_of(kernel.op, pattern, dtype=dtype, device=kernel.device)
    names = list(inputs)
    for chosen in (names, *([name] for name in names)):
        changed = {n: LAYOUTS[layout](x) if n in chosen else x for n, x in inputs.items()}
        if kernel.op in ("csr_add_", "csr_scatter_"):
            changed["w"] = changed["w"].clone() if "w" not in chosen else changed["w"]
            if overlaps_itself(changed["w"]):
                continue  # refused: see test_csr_add.py
        check(kernel, pattern, changed)


@pytest.mark.ops(*REDUCING, "csr_add", "csr_gather", dtypes=[torch.float32])
def test_lazily_negated_views_are_read_correctly(kernel: Served, pattern: CsrPattern) -> None:
    """The imaginary part of a conjugate is a real tensor whose memory has the other sign."""
    inputs = inputs_of(kernel.op, pattern, device=kernel.device)
    inputs = {name: torch.complex(x, -x).conj().imag for name, x in inputs.items()}
    assert all(x.is_neg() for x in inputs.values())
    check(kernel, pattern, inputs)


@pytest.mark.ops(
    "spmm", "csr_add", "csr_add_", "csr_scatter_",
    dtypes=NARROW, where=lambda kernel: kernel.takes_float32_values,
)  # fmt: skip
@sweep(nasty=NASTY)
def test_float32_values_beside_16_bit_operands(
    kernel: Served, nasty: CsrPattern, dtype: torch.dtype
) -> None:
    inputs = inputs_of(kernel.op, nasty, 17, dtype, kernel.device)
    inputs["values"] = inputs["values"].float() * 1.001
    check(kernel, nasty, inputs)


@pytest.mark.ops("sddmm", dtypes=NARROW)
@sweep(nasty=NASTY)
def test_float32_output_of_16_bit_operands(
    kernel: Served, nasty: CsrPattern, dtype: torch.dtype
) -> None:
    inputs = inputs_of("sddmm", nasty, 17, dtype, kernel.device)
    check(kernel, nasty, inputs, out_dtype=torch.float32)


def takes_inf_and_nan(kernel: Served) -> bool:
    """Whether the kernel takes operands with Inf and NaN."""
    return not kernel.finite_only


def poison(inputs: dict[str, Tensor], pattern: CsrPattern, referenced: bool) -> None:
    """Write Inf and NaN into the rows of a and b that have nonzeros, or into the other rows."""
    for name, counts in (("a", pattern.row_nnz), ("b", pattern.col_nnz)):
        if name in inputs:
            rows = ((counts > 0) == referenced).nonzero().flatten()
            assert rows.numel() >= 2
            inputs[name][rows[::2], -1] = torch.inf
            inputs[name][rows[1::2], 0] = torch.nan


@pytest.mark.ops(*REDUCING, where=takes_inf_and_nan)
@sweep(order=["row-major", "token-major"])
def test_unreferenced_inf_and_nan_do_not_leak(
    kernel: Served, order: str, dtype: torch.dtype
) -> None:
    pattern = CsrPattern.from_mask(
        torch.rand(60, 70, generator=torch.Generator().manual_seed(2)) < 0.01
    )
    inputs = inputs_of(kernel.op, pattern, 21, dtype, kernel.device)
    if order == "row-major":
        inputs = {name: x.contiguous() for name, x in inputs.items()}
    poison(inputs, pattern.to(kernel.device), referenced=False)
    assert bool(check(kernel, pattern, inputs).isfinite().all())


@pytest.mark.ops(*REDUCING, where=takes_inf_and_nan)
def test_referenced_inf_and_nan_propagate(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """assert_accurate demands NaN and signed Inf exactly where float64 arithmetic has them."""
    inputs = inputs_of(kernel.op, pattern, 21, dtype, kernel.device)
    poison(inputs, pattern.to(kernel.device), referenced=True)
    got = check(kernel, pattern, inputs)
    assert bool(got.isnan().any())
    assert bool(got.isinf().any())


@pytest.mark.ops("spmm", "csr_add", "csr_add_", "csr_scatter_")
def test_inf_and_nan_values_propagate(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, dtype=kernel.dtype, device=kernel.device)
    inputs["values"][3], inputs["values"][40] = -torch.inf, torch.nan
    got = check(kernel, pattern, inputs)
    assert bool(got.isnan().any())
    assert bool(got.isneginf().any())


@pytest.mark.ops(*ALL)
def test_subnormal_results_are_not_flushed(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """Each result is one product (k = 1, or one nonzero per row) that is rounded once."""
    tiny = torch.finfo(dtype).tiny
    pattern = CsrPattern.from_mask(torch.eye(40, 50)) if kernel.op == "spmm" else pattern
    scale = tiny**0.5 / 2 if kernel.op in REDUCING else tiny
    inputs = inputs_of(kernel.op, pattern, 1, dtype, kernel.device)
    got = check(kernel, pattern, {name: x * scale for name, x in inputs.items()})
    assert bool(((got != 0) & (got.abs() < tiny)).any())


@pytest.mark.ops(*REDUCING, dtypes=[torch.float16])
def test_sums_of_subnormal_float16_products(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, 33, torch.float16, kernel.device)
    check(kernel, pattern, {name: x / 1024 for name, x in inputs.items()})


@pytest.mark.ops(*REDUCING, dtypes=[torch.float16])
def test_float16_results_overflow_to_inf(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, 33, torch.float16, kernel.device)
    inputs = {name: x * 200 for name, x in inputs.items()}
    assert bool(check(kernel, pattern, inputs).isinf().any())
    if kernel.op == "sddmm":
        wide = check(kernel, pattern, inputs, out_dtype=torch.float32)
        assert bool(wide.isfinite().all())


@pytest.mark.ops(*ALL, dtypes=[torch.bfloat16])
def test_offsets_beyond_32_bits(kernel: Served) -> None:
    """Rows are 2**30 elements apart, so that the third starts beyond 2**31.

    Only the pages in use take memory.
    """
    stride = 2**30 + 5
    try:
        storage = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=kernel.device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4 GiB of address space")
    pattern = CsrPattern.from_mask(torch.ones(3, 3))
    inputs = inputs_of(kernel.op, pattern, 3, torch.bfloat16, kernel.device)
    far = storage.as_strided((3, 3), (stride, 1))
    name = "w" if "w" in inputs else "b"
    inputs[name] = far.copy_(inputs[name])
    check(kernel, pattern, inputs)
