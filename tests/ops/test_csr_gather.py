"""csr_gather copies, so every comparison here is for equal bits."""

from __future__ import annotations

import pytest
import torch
from conftest import Served, inputs_of, sweep

from rosa_kernels import CsrPattern
from rosa_kernels.testing import LAYOUTS, NASTY

pytestmark = pytest.mark.ops("csr_gather", dtypes=[torch.float32])
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@sweep(nasty=NASTY, layout=LAYOUTS.keys())
def test_equals_indexing_of_the_dense_matrix(
    kernel: Served, nasty: CsrPattern, layout: str
) -> None:
    w = inputs_of("csr_gather", nasty, 0, device=kernel.device)["w"]
    w = LAYOUTS[layout](w) if w.numel() else w
    nasty = nasty.to(kernel.device)
    got = kernel(nasty, w=w)
    assert torch.equal(got, w[nasty.row_indices.long(), nasty.col_indices.long()])
    assert got.is_contiguous()


@pytest.mark.ops("csr_gather")
def test_keeps_every_bit(kernel: Served, pattern: CsrPattern, dtype: torch.dtype) -> None:
    """The random bits include NaN payloads, infinities, subnormals and signed zeros."""
    bits = BITS[dtype.itemsize]
    info = torch.iinfo(bits)
    w = torch.randint(info.min, info.max, pattern.shape, dtype=bits, device=kernel.device)
    w[0, :], w[1, :], w[2, :] = info.min, info.max, 0
    mask = pattern.to_torch(torch.ones(pattern.nnz)).to_dense().to(kernel.device) != 0
    got = kernel(pattern.to(kernel.device), w=w.view(dtype))
    assert got.dtype == dtype
    assert torch.equal(got.view(bits), w[mask])


def test_reads_a_row_of_the_greatest_length(kernel: Served) -> None:
    """A row may have 2**31 - 1 columns. Its strides are 0, so it needs no memory."""
    n = 2**31 - 1
    columns = torch.tensor([0, 40_000, n - 1])
    pattern = CsrPattern(torch.tensor([0, 3]), columns, (1, n)).to(kernel.device)
    w = torch.tensor([[3.0]], device=kernel.device).expand(1, n)
    assert kernel(pattern, w=w).tolist() == [3.0, 3.0, 3.0]
