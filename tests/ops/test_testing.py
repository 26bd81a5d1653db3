"""The accuracy policy accepts results that are right up to rounding and catches planted errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DTYPES, inputs_of, sweep
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import (
    OPS,
    Case,
    assert_accurate,
    make_inputs,
    max_error,
    oracle,
    uniform_pattern,
)

K = 64
BOUNDS = ("typical", "adversarial")  # the two error bounds of the policy
Plant = Callable[[str, CsrPattern, dict[str, Tensor], Tensor], Tensor]


def compute(op: str, pattern: CsrPattern, inputs: dict[str, Tensor]) -> Tensor:
    return getattr(rk, op)(pattern=pattern, **inputs, backend="reference")


@pytest.fixture
def full() -> CsrPattern:
    """A pattern with rows so long that a wrong accumulation shows in SpMM too."""
    return uniform_pattern(24, 96, 0.7, seed=5)


@sweep(op=OPS, dtype=DTYPES, bound=BOUNDS)
def test_the_rounded_exact_result_is_accepted(
    op: str, full: CsrPattern, bound: str, dtype: torch.dtype
) -> None:
    inputs = inputs_of(op, full, K, dtype)
    exact = oracle(op, full, inputs)[0].to(dtype)
    assert_accurate(op, full, inputs, exact, adversarial=bound == "adversarial")


@sweep(op=OPS, dtype=DTYPES, bound=BOUNDS)
def test_any_order_of_summation_is_accepted(
    op: str, full: CsrPattern, bound: str, dtype: torch.dtype
) -> None:
    """Sums in float32 may run from the first token to the last, or from the last to the first."""
    inputs = inputs_of(op, full, K, dtype)
    assert_accurate(op, full, inputs, compute(op, full, inputs), adversarial=bound == "adversarial")
    if op == "sddmm":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a = inputs["a"][full.row_indices.long()].to(wide)
        b = inputs["b"][full.col_indices.long()].to(wide)
        for order in (range(K), reversed(range(K))):
            total = torch.zeros(full.nnz, dtype=wide)
            for step in order:
                total += a[:, step] * b[:, step]
            assert_accurate(op, full, inputs, total.to(dtype), adversarial=bound == "adversarial")


# -- planted errors: each function returns a result that is wrong in one way -----------------------


def bfloat16_accumulation(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor
) -> Tensor:
    """The sums are kept in bfloat16, as in a careless kernel."""
    if op == "sddmm":
        a = inputs["a"][pattern.row_indices.long()].bfloat16()
        b = inputs["b"][pattern.col_indices.long()].bfloat16()
        total = torch.zeros(pattern.nnz, dtype=torch.bfloat16)
        for step in range(K):
            total += a[:, step] * b[:, step]
        return total.to(got.dtype)
    total = torch.zeros(got.shape, dtype=torch.bfloat16)
    products = inputs["values"].bfloat16()[:, None] * inputs["b"].bfloat16()[pattern.col_indices]
    for t, row in enumerate(pattern.row_indices.tolist()):
        total[row] += products[t]
    return total.to(got.dtype)


def tf32_products(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    """The operands are cut to TF32's 10 bits. The rest is exact."""
    cut = {
        name: (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
        for name, x in inputs.items()
    }
    return compute(op, pattern, cut).to(got.dtype)


def dropped_term(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    """One row lacks one nonzero or one token."""
    cut = {name: x.clone() for name, x in inputs.items()}
    if op == "sddmm":
        cut["a"][7, -1] = 0
    else:
        cut["values"][-1] = 0
    return compute(op, pattern, cut)


def one_nan(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    got.view(-1)[-1] = torch.nan
    return got


def all_nan(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    """The output was filled with NaN, and no kernel ran."""
    return torch.full_like(got, torch.nan)


def one_wrong_element(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor
) -> Tensor:
    """One element is off by 1/2048, or in a 16-bit dtype by three units in the last place."""
    flat = got.view(-1)
    at = int(flat.abs().argmax())
    flat[at] *= 1 + max(3 * torch.finfo(got.dtype).eps, 2.0**-11)
    return got


def one_inf(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    got.view(-1)[0] = torch.inf
    return got


def exchanged_elements(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor
) -> Tensor:
    flat = got.view(-1)
    flat[:2] = flat[:2].flip(0)
    return got


def stale_zeros(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    """The last eight elements were never written."""
    got.view(-1)[-8:] = 0
    return got


def wrong_shape(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    return got[:-1]


def extra_dimension(op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor) -> Tensor:
    return got[None]


EVERYWHERE: list[Plant] = [
    one_nan,
    all_nan,
    one_wrong_element,
    one_inf,
    exchanged_elements,
    stale_zeros,
    wrong_shape,
    extra_dimension,
]


def assert_caught(
    plant: Plant, op: str, pattern: CsrPattern, dtype: torch.dtype, bound: str
) -> None:
    inputs = inputs_of(op, pattern, K, dtype)
    right = compute(op, pattern, inputs)
    assert_accurate(op, pattern, inputs, right, adversarial=bound == "adversarial")
    wrong = plant(op, pattern, inputs, right.contiguous())
    with pytest.raises(AssertionError, match=f"^{op}: "):
        assert_accurate(op, pattern, inputs, wrong, adversarial=bound == "adversarial")


@pytest.mark.parametrize("plant", EVERYWHERE)
@sweep(op=OPS, dtype=DTYPES, bound=BOUNDS)
def test_planted_errors_are_caught(
    plant: Plant, op: str, full: CsrPattern, dtype: torch.dtype, bound: str
) -> None:
    assert_caught(plant, op, full, dtype, bound)


@pytest.mark.parametrize("plant", [bfloat16_accumulation, dropped_term])
@sweep(op=["sddmm", "spmm"], dtype=DTYPES, bound=BOUNDS)
def test_wrong_sums_are_caught(
    plant: Plant, op: str, full: CsrPattern, dtype: torch.dtype, bound: str
) -> None:
    assert_caught(plant, op, full, dtype, bound)


@sweep(op=["sddmm", "spmm"], bound=BOUNDS)
def test_tf32_products_are_caught(op: str, full: CsrPattern, bound: str) -> None:
    assert_caught(tf32_products, op, full, torch.float32, bound)


def test_values_rounded_twice_are_caught(full: CsrPattern) -> None:
    """float32 master values must not pass through bfloat16 on their way into a bfloat16 weight."""
    inputs = inputs_of("csr_add", full, dtype=torch.bfloat16)
    inputs["values"] = inputs_of("csr_add", full)["values"]
    twice = {**inputs, "values": inputs["values"].bfloat16()}
    assert_accurate("csr_add", full, inputs, compute("csr_add", full, inputs))
    with pytest.raises(AssertionError, match="elements outside the bound"):
        assert_accurate("csr_add", full, inputs, compute("csr_add", full, twice))


def test_inf_and_nan_must_match_exactly(full: CsrPattern) -> None:
    inputs = inputs_of("sddmm", full)
    inputs["a"][3, 0], inputs["a"][4, 0] = torch.inf, torch.nan
    right = compute("sddmm", full, inputs)
    assert_accurate("sddmm", full, inputs, right)
    for start, wrong in (
        (3, torch.nan),
        (3, 0.0),
        (3, torch.finfo().max),
        (4, 0.0),
        (4, torch.inf),
    ):
        got = right.clone()
        got[full.crow_indices[start]] = wrong
        with pytest.raises(AssertionError, match="sddmm: 1 of"):
            assert_accurate("sddmm", full, inputs, got)
    with pytest.raises(AssertionError):
        assert_accurate("sddmm", full, inputs, torch.where(right.isinf(), -right, right))


def test_the_message_names_the_worst_element(full: CsrPattern) -> None:
    inputs = inputs_of("spmm", full, K)
    got = compute("spmm", full, inputs).contiguous()
    got[5, 6] += 1
    got[7, 8] += 1000
    with pytest.raises(AssertionError, match=r"spmm: 2 of 1536 elements .* worst at \(7, 8\): exp"):
        assert_accurate("spmm", full, inputs, got)


@sweep(bound=BOUNDS)
def test_a_wrong_alpha_is_caught(full: CsrPattern, bound: str) -> None:
    inputs = inputs_of("csr_add", full)
    got = rk.csr_add(pattern=full, alpha=-0.3, **inputs)
    assert_accurate("csr_add", full, inputs, got, alpha=-0.3, adversarial=bound == "adversarial")
    with pytest.raises(AssertionError):
        assert_accurate("csr_add", full, inputs, got, adversarial=bound == "adversarial")


# -- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "density"), [(10, 20, 0.33), (7, 5, 1.0), (0, 5, 0.5), (4, 4, 0)]
)
def test_uniform_patterns_follow_density_and_seed(m: int, n: int, density: float) -> None:
    pattern = uniform_pattern(m, n, density, seed=1)
    assert pattern.shape == (m, n)
    assert pattern.nnz == int(density * m * n)
    again = uniform_pattern(m, n, density, seed=1)
    assert torch.equal(pattern.col_indices, again.col_indices)
    if 0 < pattern.nnz < m * n:
        other = uniform_pattern(m, n, density, seed=2)
        assert not torch.equal(pattern.col_indices, other.col_indices)


@pytest.mark.parametrize("op", OPS)
def test_inputs_depend_only_on_the_seed(op: str, pattern: CsrPattern, dtype: torch.dtype) -> None:
    case = Case(op, *pattern.shape, 8, pattern.density, dtype)
    first, again = make_inputs(case, pattern), make_inputs(case, pattern)
    other = make_inputs(Case(op, *pattern.shape, 8, pattern.density, dtype, seed=1), pattern)
    for name, x in first.items():
        assert x.dtype == dtype
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda pattern: make_inputs(Case("conv", 1, 1, 1, 1.0), pattern),
        lambda pattern: oracle("conv", pattern, {}),
    ],
    ids=["make_inputs", "oracle"],
)
def test_unknown_ops_are_refused(
    function: Callable[[CsrPattern], object], pattern: CsrPattern
) -> None:
    with pytest.raises(ValueError, match=r"expected an op among .*, got 'conv'"):
        function(pattern)


def test_max_error_of_right_and_wrong_results(full: CsrPattern) -> None:
    inputs = inputs_of("spmm", full, K)
    exact = oracle("spmm", full, inputs)[0]
    assert max_error("spmm", full, inputs, exact) == 0
    assert max_error("spmm", full, inputs, 2 * exact) > 0.1
    empty = uniform_pattern(0, 3, 0.0)
    assert max_error("spmm", empty, inputs_of("spmm", empty), torch.zeros(0, 33)) == 0
