"""The accuracy policy on every registered kernel of every op, in every nasty case."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SIZES, Served, check, inputs_of
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.strides import overlaps_itself

REDUCING = ("sddmm", "spmm")
COPYING = ("csr_add", "csr_add_", "csr_gather", "csr_scatter_")
ALL = REDUCING + COPYING


@pytest.mark.ops(*REDUCING)
@pytest.mark.parametrize("k", [0, 1, 33])
def test_patterns(kernel: Served, nasty: CsrPattern, k: int) -> None:
    check(kernel, nasty, inputs_of(kernel.op, nasty, k, kernel.dtype, kernel.device))


@pytest.mark.ops(*COPYING)
def test_patterns_of_ops_without_k(kernel: Served, nasty: CsrPattern, dtype: torch.dtype) -> None:
    check(kernel, nasty, inputs_of(kernel.op, nasty, 0, dtype, kernel.device))


@pytest.mark.ops(*REDUCING)
@pytest.mark.parametrize("k", SIZES)
def test_sizes(kernel: Served, pattern: CsrPattern, k: int, dtype: torch.dtype) -> None:
    check(kernel, pattern, inputs_of(kernel.op, pattern, k, dtype, kernel.device))


@pytest.mark.ops(*REDUCING)
@pytest.mark.parametrize("size", SIZES[1:])
def test_sizes_of_the_pattern(kernel: Served, size: int) -> None:
    """Rows and columns off by one from every block, full and sparse."""
    for m, n, density in ((size, 40, 0.3), (40, size, 0.3), (size, size, 1.0)):
        pattern = CsrPattern.from_mask(
            torch.rand(m, n, generator=torch.Generator().manual_seed(size)) < density
        )
        check(kernel, pattern, inputs_of(kernel.op, pattern, 5, kernel.dtype, kernel.device))


@pytest.mark.ops(*ALL)
def test_layouts(
    kernel: Served, pattern: CsrPattern, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """All operands, then each alone, misaligned, sliced, of either order or sharing memory."""
    inputs = inputs_of(kernel.op, pattern, dtype=dtype, device=kernel.device)
    names = list(inputs)
    for chosen in (names, *([name] for name in names)):
        changed = {name: layout(x) if name in chosen else x for name, x in inputs.items()}
        if kernel.op in ("csr_add_", "csr_scatter_"):
            changed["w"] = changed["w"].clone() if "w" not in chosen else changed["w"]
            if overlaps_itself(changed["w"]):
                continue  # refused: see test_csr_add.py
        check(kernel, pattern, changed)


@pytest.mark.ops(*REDUCING, "csr_add", "csr_gather")
def test_lazily_negated_views(kernel: Served, pattern: CsrPattern) -> None:
    """A real tensor may be the imaginary part of a conjugate: its memory has the other sign."""
    inputs = inputs_of(kernel.op, pattern, device=kernel.device)
    if kernel.dtype != torch.float32:
        pytest.skip("complex numbers have float32 parts")
    inputs = {name: torch.complex(x, -x).conj().imag for name, x in inputs.items()}
    assert all(x.is_neg() for x in inputs.values())
    check(kernel, pattern, inputs)


@pytest.mark.ops("spmm", "csr_add", "csr_add_", "csr_scatter_")
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_float32_values_over_narrow_operands(
    kernel: Served, nasty: CsrPattern, narrow: torch.dtype
) -> None:
    inputs = inputs_of(kernel.op, nasty, 17, narrow, kernel.device)
    inputs["values"] = inputs["values"].float() * 1.001
    if not kernel.takes_float32_values:
        pytest.skip("rejects them")
    check(kernel, nasty, inputs)


@pytest.mark.ops("sddmm")
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_float32_output_of_narrow_operands(
    kernel: Served, nasty: CsrPattern, narrow: torch.dtype
) -> None:
    inputs = inputs_of("sddmm", nasty, 17, narrow, kernel.device)
    check(kernel, nasty, inputs, out_dtype=torch.float32)


def skip_finite_only(kernel: Served) -> None:
    if kernel.finite_only:
        pytest.skip(f"{kernel.backend} is declared for finite operands only")


def poison(inputs: dict[str, Tensor], pattern: CsrPattern, referenced: bool) -> None:
    """Inf and NaN into rows of the dense operands that the pattern does (not) refer to."""
    for name, counts in (("a", pattern.row_nnz), ("b", pattern.col_nnz)):
        if name in inputs:
            rows = ((counts > 0) == referenced).nonzero().flatten()
            assert rows.numel() >= 2
            inputs[name][rows[::2], -1] = torch.inf
            inputs[name][rows[1::2], 0] = torch.nan


@pytest.mark.ops(*REDUCING)
@pytest.mark.parametrize("order", ["row-major", "token-major"])
def test_inf_and_nan_in_unreferenced_rows_do_not_leak(
    kernel: Served, order: str, dtype: torch.dtype
) -> None:
    skip_finite_only(kernel)
    pattern = CsrPattern.from_mask(
        torch.rand(60, 70, generator=torch.Generator().manual_seed(2)) < 0.01
    )
    inputs = inputs_of(kernel.op, pattern, 21, dtype, kernel.device)
    if order == "row-major":
        inputs = {name: x.contiguous() for name, x in inputs.items()}
    poison(inputs, pattern.to(kernel.device), referenced=False)
    assert bool(check(kernel, pattern, inputs).isfinite().all())


@pytest.mark.ops(*REDUCING)
def test_inf_and_nan_in_referenced_rows_propagate(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """Exactly where float64 arithmetic has them, Inf with its sign: assert_accurate sees to it."""
    skip_finite_only(kernel)
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
    """One product each (k = 1 or one nonzero a row), which is then rounded once."""
    tiny = torch.finfo(dtype).tiny
    pattern = CsrPattern.from_mask(torch.eye(40, 50)) if kernel.op == "spmm" else pattern
    scale = tiny**0.5 / 2 if kernel.op in REDUCING else tiny
    inputs = inputs_of(kernel.op, pattern, 1, dtype, kernel.device)
    got = check(kernel, pattern, {name: x * scale for name, x in inputs.items()})
    assert bool(((got != 0) & (got.abs() < tiny)).any())


@pytest.mark.ops(*REDUCING)
def test_float16_results_that_are_subnormal(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, 33, torch.float16, kernel.device)
    check(kernel, pattern, {name: x / 1024 for name, x in inputs.items()})


@pytest.mark.ops(*REDUCING)
def test_float16_results_that_overflow(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, 33, torch.float16, kernel.device)
    inputs = {name: x * 200 for name, x in inputs.items()}
    assert bool(check(kernel, pattern, inputs).isinf().any())
    if kernel.op == "sddmm":
        wide = check(kernel, pattern, inputs, out_dtype=torch.float32)
        assert bool(wide.isfinite().all())


@pytest.mark.ops(*ALL)
def test_offsets_beyond_32_bits(kernel: Served) -> None:
    """Rows 2**30 elements apart: the third starts past 2**31. Only the pages in use are touched."""
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
