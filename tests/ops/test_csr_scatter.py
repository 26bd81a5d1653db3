"""csr_scatter_ copies values into place and restores the bits that csr_add_ changed.

test_csr_add.py tests the targets of both ops.
"""

from __future__ import annotations

import pytest
import torch
from conftest import NARROW, Served, inputs_of, sweep
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import LAYOUTS, NASTY

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random bits, with NaN payloads, infinities, subnormals and signed zeros among them."""
    bits = BITS[dtype.itemsize]
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(info.min, info.max, shape, dtype=bits, generator=generator)
    x.flatten()[: x.numel() // 2 : 5] = info.min  # -0.0
    x.flatten()[1 : x.numel() // 2 : 5] = info.max  # a NaN of all ones
    return x.view(dtype).to(device)


@pytest.mark.ops("csr_scatter_", dtypes=[torch.float32])
@sweep(nasty=NASTY, layout=[name for name in LAYOUTS if not name.startswith("stride-")])
def test_equals_index_assignment(kernel: Served, nasty: CsrPattern, layout: str) -> None:
    """Targets that overlap themselves (stride-*) are refused: see test_csr_add.py."""
    inputs = inputs_of("csr_scatter_", nasty, 0, device=kernel.device)
    w = LAYOUTS[layout](inputs["w"]) if inputs["w"].numel() else inputs["w"]
    nasty = nasty.to(kernel.device)
    expected = w.clone()
    expected[nasty.row_indices.long(), nasty.col_indices.long()] = inputs["values"]
    assert kernel(nasty, w=w, values=inputs["values"]) is w
    assert torch.equal(w, expected)


@pytest.mark.ops("csr_scatter_")
def test_keeps_every_bit(kernel: Served, pattern: CsrPattern, dtype: torch.dtype) -> None:
    """NaN payloads and signed zeros are kept, in written elements and in the others."""
    bits = BITS[dtype.itemsize]
    w = random_bits(pattern.shape, dtype, kernel.device)
    values = random_bits((pattern.nnz,), dtype, kernel.device)
    expected = w.clone().view(bits)
    pattern = pattern.to(kernel.device)
    at = (pattern.row_indices.long(), pattern.col_indices.long())
    expected[at] = values.view(bits)
    kernel(pattern, w=w, values=values)
    assert torch.equal(w.view(bits), expected)


@pytest.mark.ops("csr_scatter_")
@sweep(nasty=NASTY, order=["row-major", "token-major", "sliced"])
def test_gather_add_scatter_restores_every_bit(
    kernel: Served, nasty: CsrPattern, order: str, dtype: torch.dtype
) -> None:
    """Adding and then subtracting would not restore every bit."""
    w = LAYOUTS[order](random_bits(nasty.shape, dtype, kernel.device))
    before = w.clone()
    nasty = nasty.to(kernel.device)
    backend = kernel.backend
    kept = rk.csr_gather(w, nasty, backend=backend)
    rk.csr_add_(w, nasty, torch.randn(nasty.nnz, device=w.device).to(dtype), backend=backend)
    rk.csr_scatter_(w, nasty, kept, backend=backend)
    bits = BITS[dtype.itemsize]
    assert torch.equal(w.contiguous().view(bits), before.contiguous().view(bits))


@pytest.mark.ops("csr_scatter_", dtypes=NARROW)
def test_float32_values_are_rounded_to_nearest_even(kernel: Served, dtype: torch.dtype) -> None:
    values = torch.tensor([1 + 2.0**-9, 1 + 3 * 2.0**-8, 1e-9, 1e30, -0.0, torch.nan, torch.inf])
    pattern = CsrPattern.from_mask(torch.ones(1, 7)).to(kernel.device)
    w = torch.zeros(1, 7, dtype=dtype, device=kernel.device)
    kernel(pattern, w=w, values=values.to(kernel.device))
    expected = values.to(dtype)
    assert torch.equal(w[0].cpu().isnan(), expected.isnan())
    assert torch.equal(w[0].cpu().nan_to_num(), expected.nan_to_num())
    assert bool(w[0, 4].signbit())


def test_a_lazily_negated_target_is_refused(pattern: CsrPattern) -> None:
    x = inputs_of("csr_scatter_", pattern, 0)["w"]
    w = torch.complex(x, -x).conj().imag
    with pytest.raises(RuntimeError, match=r"csr_scatter_: .* got a lazily negated view"):
        rk.csr_scatter_(w, pattern, torch.zeros(pattern.nnz))
