"""csr_transpose, and the transpose that a pattern caches."""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES, Served, sweep

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import NASTY


def dense(pattern: CsrPattern, values: torch.Tensor) -> torch.Tensor:
    return pattern.to_torch(values).to_dense()


def numbered(pattern: CsrPattern) -> torch.Tensor:
    """Values that are all different and not zero."""
    return torch.arange(1.0, pattern.nnz + 1, dtype=torch.float64)


@pytest.mark.ops("csr_transpose")
@sweep(nasty=NASTY)
def test_kernels_sort_stably_by_column(kernel: Served, nasty: CsrPattern) -> None:
    """The stable sort by column is the only right answer."""
    m, n = nasty.shape
    moved = nasty.to(kernel.device)
    got = kernel.run(moved.crow_indices, moved.col_indices, n)
    order = torch.argsort(nasty.col_indices, stable=True)
    counts = torch.bincount(nasty.col_indices, minlength=n)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    expected = (crow, nasty.row_indices[order], order)
    for tensor, want in zip(got, expected, strict=True):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.device.type == kernel.device
        assert torch.equal(tensor.cpu(), want.int())
    CsrPattern(*got[:2], (n, m))


@sweep(nasty=NASTY, dtype=DTYPES)
def test_equals_the_dense_transpose(nasty: CsrPattern, dtype: torch.dtype) -> None:
    values = numbered(nasty).to(dtype)
    pattern_t, values_t = rk.csr_transpose(nasty, values)
    assert values_t.dtype == dtype
    assert pattern_t.shape == nasty.shape[::-1]
    assert torch.equal(dense(pattern_t, values_t), dense(nasty, values).T)


@sweep(nasty=NASTY)
def test_transposing_twice_gives_the_original(nasty: CsrPattern) -> None:
    values = numbered(nasty)
    pattern, back = rk.csr_transpose(*rk.csr_transpose(nasty, values))
    assert pattern is nasty
    assert torch.equal(back, values)


def test_the_transpose_is_built_once(pattern: CsrPattern) -> None:
    assert not pattern.has_transpose
    first = rk.csr_transpose(pattern, numbered(pattern))[0]
    assert pattern.has_transpose
    assert rk.csr_transpose(pattern, numbered(pattern))[0] is first
    assert pattern.T is first
    assert first.T is pattern


@sweep(nasty=NASTY)
def test_the_transpose_is_a_valid_pattern(nasty: CsrPattern) -> None:
    """The library does not validate a transpose that it builds."""
    t = nasty.T
    again = CsrPattern(t.crow_indices, t.col_indices, t.shape)
    assert again.nnz == nasty.nnz
    permutation = nasty.transpose_permutation.long()
    assert torch.equal(permutation.sort().values, torch.arange(nasty.nnz))
    assert torch.equal(permutation[t.transpose_permutation.long()], torch.arange(nasty.nnz))


def test_strided_values_are_accepted(pattern: CsrPattern) -> None:
    values = numbered(pattern)
    wide = torch.stack([values, -values], 1)[:, 0]
    assert torch.equal(rk.csr_transpose(pattern, wide)[1], rk.csr_transpose(pattern, values)[1])


def test_the_gradient_is_permuted_back(pattern: CsrPattern) -> None:
    values = numbered(pattern).requires_grad_()
    _, values_t = rk.csr_transpose(pattern, values)
    weight = torch.randn(pattern.nnz, dtype=torch.float64)
    (values_t * weight).sum().backward()
    assert torch.equal(values.grad[pattern.transpose_permutation.long()], weight)
