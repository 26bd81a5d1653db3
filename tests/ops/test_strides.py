"""Functions of strides agree with brute force over every address."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_kernels.strides import empty_like_order, overlaps_itself, share_memory

SIZES = st.integers(0, 4)
STRIDES = st.integers(0, 6)


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(64).as_strided(shape, strides)


def addresses(x: torch.Tensor) -> list[int]:
    return [
        x.storage_offset() + sum(i * stride for i, stride in zip(index, x.stride(), strict=True))
        for index in itertools.product(*map(range, x.shape))
    ]


def shares_memory(x: torch.Tensor) -> bool:
    return len({*addresses(x)}) < x.numel()


@settings(max_examples=500)
@given(st.tuples(SIZES, SIZES), st.tuples(STRIDES, STRIDES))
def test_every_overlap_is_found(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """overlaps_itself misses no overlap. It may be true for interleaved tensors without overlap."""
    x = strided(shape, strides)
    assert overlaps_itself(x) or not shares_memory(x)


@given(st.permutations([0, 1]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_slices_of_a_matrix_do_not_overlap(
    order: list[int], down: int, right: int, to: int
) -> None:
    x = torch.zeros(6, 7).permute(order)[to::down, ::right]
    assert not shares_memory(x)
    assert not overlaps_itself(x)


BLOCK = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6))


@settings(max_examples=300)
@given(BLOCK, BLOCK, st.booleans())
def test_blocks_of_a_matrix_share_memory_or_not(
    one: tuple[int, ...], two: tuple[int, ...], transposed: bool
) -> None:
    x = torch.zeros(6, 6).t() if transposed else torch.zeros(6, 6)
    a, b = (x[top : top + rows, left : left + cols] for top, rows, left, cols in (one, two))
    overlap = not {*addresses(a)}.isdisjoint(addresses(b))
    assert share_memory(a, b) is share_memory(b, a) is overlap


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (0, 1), True),
        ((3, 4), (1, 0), True),
        ((3, 4), (1, 1), True),
        ((3, 4), (3, 1), True),
        ((1, 4), (0, 1), False),
        ((4, 1), (1, 0), False),
        ((1, 1), (0, 0), False),
        ((0, 4), (0, 0), False),
    ],
)
def test_overlaps_of_given_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], overlaps: bool
) -> None:
    assert overlaps_itself(strided(shape, strides)) is overlaps


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("n", "k"), [(3, 4), (1, 4), (3, 1), (0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_follow_the_order_of_their_operand(
    n: int, k: int, rows: int, dtype: torch.dtype
) -> None:
    row_major, token_major = torch.zeros(n, k, dtype=dtype), torch.zeros(k, n, dtype=dtype).T
    for b in (row_major, token_major, row_major.expand(n, k), torch.zeros(1, 1).expand(n, k)):
        out = empty_like_order(b, rows)
        assert out.shape == (rows, k)
        assert out.dtype == b.dtype
        assert not overlaps_itself(out)
    if n > 1 and k > 1 and rows:
        assert empty_like_order(row_major, rows).stride() == (k, 1)
        assert empty_like_order(token_major, rows).stride() == (1, rows)
