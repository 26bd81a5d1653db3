"""Properties of every pattern and all data. Hypothesis searches for counterexamples.

Rounding errors do not average out on its examples, so the adversarial bound of the accuracy policy
applies. An identity compares two computed sides on small whole numbers in float32. All sums are
exact then, and both sides must have equal bits.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Served
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from rosa_kernels import CsrPattern, csr_transpose
from rosa_kernels.testing import assert_accurate

EXAMPLES = settings(max_examples=25)


@st.composite
def patterns(draw: st.DrawFn, most: int = 20) -> CsrPattern:
    shape = draw(st.tuples(st.integers(0, most), st.integers(0, most)))
    mask = draw(hnp.arrays(bool, shape, elements=st.booleans(), fill=st.booleans()))
    return CsrPattern.from_mask(torch.from_numpy(mask.copy()))


DATA = st.data()
SEEDS = st.integers(0, 2**32)
TOKENS = st.integers(0, 40)
ORDERS = st.booleans()


def wild(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Zeros and numbers of both signs from 2**-6 to 2**6, which float16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(-1, 2, shape, generator=generator)
    magnitude = torch.exp2(torch.rand(shape, generator=generator, dtype=torch.float64) * 12 - 6)
    return (sign * magnitude).to(dtype)


def whole(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers so small that sums of 40 products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def laid_out(x: Tensor, token_major: bool) -> Tensor:
    return x.T.contiguous().T if token_major else x


def sddmm_inputs(pattern: CsrPattern, k: int, seed: int) -> dict[str, Tensor]:
    m, n = pattern.shape
    return {"a": whole((m, k), seed), "b": whole((n, k), seed + 1)}


def on(kernel: Served, pattern: CsrPattern, **inputs: object) -> Tensor:
    """The kernel's result on its device, moved to the CPU."""
    moved = {n: x.to(kernel.device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    return kernel(pattern.to(kernel.device), **moved).cpu()


def drawn_dtype(data: st.DataObject, kernel: Served) -> torch.dtype:
    return data.draw(st.sampled_from(sorted(kernel.dtypes, key=str)))


# -- accuracy on adversarial data ------------------------------------------------------------------


@pytest.mark.ops("sddmm")
@EXAMPLES
@given(DATA, patterns(), TOKENS, SEEDS, ORDERS, ORDERS)
def test_sddmm_is_accurate_on_adversarial_data(
    kernel: Served,
    data: st.DataObject,
    pattern: CsrPattern,
    k: int,
    seed: int,
    a_order: bool,
    b_order: bool,
) -> None:
    dtype = drawn_dtype(data, kernel)
    m, n = pattern.shape
    a = laid_out(wild((m, k), dtype, seed), a_order)
    b = laid_out(wild((n, k), dtype, seed + 1), b_order)
    got = on(kernel, pattern, a=a, b=b)
    assert_accurate("sddmm", pattern, {"a": a, "b": b}, got, adversarial=True)


@pytest.mark.ops("spmm")
@EXAMPLES
@given(DATA, patterns(), TOKENS, SEEDS, ORDERS)
def test_spmm_is_accurate_on_adversarial_data(
    kernel: Served, data: st.DataObject, pattern: CsrPattern, k: int, seed: int, order: bool
) -> None:
    dtype = drawn_dtype(data, kernel)
    values = wild((pattern.nnz,), dtype, seed)
    b = laid_out(wild((pattern.shape[1], k), dtype, seed + 1), order)
    got = on(kernel, pattern, values=values, b=b)
    assert_accurate("spmm", pattern, {"values": values, "b": b}, got, adversarial=True)


@pytest.mark.ops("csr_add", "csr_add_")
@EXAMPLES
@given(DATA, patterns(), SEEDS, ORDERS, st.sampled_from([1.0, -1.0, 0.5, 0.0, 0.1, -3.7]))
def test_csr_add_equals_dense_addition(
    kernel: Served, data: st.DataObject, pattern: CsrPattern, seed: int, order: bool, alpha: float
) -> None:
    dtype = drawn_dtype(data, kernel)
    w = laid_out(wild(pattern.shape, dtype, seed), order)
    values = wild((pattern.nnz,), dtype, seed + 1)
    got = on(kernel, pattern, w=w.clone(), values=values, alpha=alpha)
    inputs = {"w": w, "values": values}
    assert_accurate("csr_add", pattern, inputs, got, alpha=alpha, adversarial=True)
    mask = pattern.to_torch(torch.ones(pattern.nnz)).to_dense() != 0
    assert torch.equal(got[~mask], w[~mask])


# -- identities ----------------------------------------------------------------------------------


def other_op(kernel: Served, op: str) -> Served:
    """`op` on the same backend, as in the backward of an op."""
    return kernel._replace(op=op)


@pytest.mark.ops("sddmm", dtypes=[torch.float32])
@EXAMPLES
@given(patterns(), TOKENS, SEEDS)
def test_sddmm_is_adjoint_to_spmm(kernel: Served, pattern: CsrPattern, k: int, seed: int) -> None:
    """<sddmm(A, B), v> = <A, spmm(v, B)> = <B, spmm(S^T, A)>"""
    inputs = sddmm_inputs(pattern, k, seed)
    values = whole((pattern.nnz,), seed + 2)
    spmm = other_op(kernel, "spmm")
    left = (on(kernel, pattern, **inputs).double() * values).sum()
    product = on(spmm, pattern, values=values, b=inputs["b"])
    assert left == (inputs["a"].double() * product).sum()
    pattern_t, values_t = csr_transpose(pattern, values)
    product_t = on(spmm, pattern_t, values=values_t, b=inputs["a"])
    assert left == (inputs["b"].double() * product_t).sum()


@pytest.mark.ops("sddmm", dtypes=[torch.float32])
@EXAMPLES
@given(patterns(), TOKENS, SEEDS)
def test_sddmm_of_exchanged_operands_is_transposed(
    kernel: Served, pattern: CsrPattern, k: int, seed: int
) -> None:
    """sddmm(S^T, B, A) is the transpose of sddmm(S, A, B)."""
    inputs = sddmm_inputs(pattern, k, seed)
    got = on(kernel, pattern, **inputs)
    exchanged = on(kernel, pattern.T, a=inputs["b"], b=inputs["a"])
    assert torch.equal(csr_transpose(pattern, got)[1], exchanged)


def permuted(pattern: CsrPattern, rows: Tensor, cols: Tensor) -> tuple[CsrPattern, Tensor]:
    """The pattern of P S Q, and for each of its entries the number of that entry in S."""
    numbers = torch.arange(1.0, pattern.nnz + 1)
    dense = pattern.to_torch(numbers).to_dense()[rows][:, cols]
    at = dense.nonzero(as_tuple=True)
    return CsrPattern.from_mask(dense), dense[at].long() - 1


@pytest.mark.ops("sddmm", "spmm", dtypes=[torch.float32])
@EXAMPLES
@given(patterns(), TOKENS, SEEDS)
def test_permuted_operands_give_permuted_results(
    kernel: Served, pattern: CsrPattern, k: int, seed: int
) -> None:
    """Rows, columns and tokens in another order give the same numbers in another order."""
    generator = torch.Generator().manual_seed(seed)
    m, n = pattern.shape
    rows, cols, tokens = (torch.randperm(size, generator=generator) for size in (m, n, k))
    other, source = permuted(pattern, rows, cols)
    if kernel.op == "sddmm":
        x = sddmm_inputs(pattern, k, seed)
        got = on(kernel, other, a=x["a"][rows][:, tokens], b=x["b"][cols][:, tokens])
        assert torch.equal(got, on(kernel, pattern, **x)[source])
    else:
        values, b = whole((pattern.nnz,), seed), whole((n, k), seed + 1)
        got = on(kernel, other, values=values[source], b=b[cols][:, tokens])
        assert torch.equal(got, on(kernel, pattern, values=values, b=b)[rows][:, tokens])


def operands(op: str, pattern: CsrPattern, k: int, seed: int) -> dict[str, Tensor]:
    m, n = pattern.shape
    shapes = {"a": (m, k), "b": (n, k), "values": (pattern.nnz,), "w": (m, n)}
    names = {"sddmm": "ab", "spmm": ("values", "b"), "csr_gather": "w", "csr_add": ("w", "values")}
    return {name: whole(shapes[name], seed + i) for i, name in enumerate(names[op])}


@pytest.mark.ops("sddmm", "spmm", "csr_gather", dtypes=[torch.float32])
@EXAMPLES
@given(patterns(), TOKENS, SEEDS, st.integers(-4, 4), DATA)
def test_ops_are_linear_in_each_operand(
    kernel: Served, pattern: CsrPattern, k: int, seed: int, factor: int, data: st.DataObject
) -> None:
    """f(c x + y) = c f(x) + f(y) if the other operand is fixed."""
    x, y = operands(kernel.op, pattern, k, seed), operands(kernel.op, pattern, k, seed + 9)
    name = data.draw(st.sampled_from(sorted(x)))
    y = {**x, name: y[name]}
    combined = {**x, name: factor * x[name] + y[name]}
    left = on(kernel, pattern, **combined)
    right = factor * on(kernel, pattern, **x) + on(kernel, pattern, **y)
    assert torch.equal(left, right)


@pytest.mark.ops("csr_add", dtypes=[torch.float32])
@EXAMPLES
@given(patterns(), SEEDS, st.integers(-4, 4))
def test_csr_add_is_linear(kernel: Served, pattern: CsrPattern, seed: int, factor: int) -> None:
    """csr_add is linear in both operands together. alpha has the effect of scaled values."""
    x, y = operands("csr_add", pattern, 0, seed), operands("csr_add", pattern, 0, seed + 9)
    combined = {name: factor * x[name] + y[name] for name in x}
    right = factor * on(kernel, pattern, **x) + on(kernel, pattern, **y)
    assert torch.equal(on(kernel, pattern, **combined), right)
    scaled = {**x, "values": factor * x["values"]}
    assert torch.equal(on(kernel, pattern, **x, alpha=factor), on(kernel, pattern, **scaled))


@pytest.mark.ops("csr_gather")
@EXAMPLES
@given(DATA, patterns(), SEEDS)
def test_gather_returns_what_was_added(
    kernel: Served, data: st.DataObject, pattern: CsrPattern, seed: int
) -> None:
    """gather(0 + S) = values, and gather(w + S) - gather(w) = values."""
    dtype = drawn_dtype(data, kernel)
    add = other_op(kernel, "csr_add")
    values = whole((pattern.nnz,), seed, dtype)
    w = whole(pattern.shape, seed + 1, dtype)
    for start in (torch.zeros_like(w), w):
        changed = on(add, pattern, w=start, values=values)
        before, after = on(kernel, pattern, w=start), on(kernel, pattern, w=changed)
        assert torch.equal(after - before, values)
