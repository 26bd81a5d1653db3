"""Patterns do not keep fake or functional tensors. Kernels refuse tensors without memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import inputs_of, sweep
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import assert_accurate, uniform_pattern

# col_nnz is missing, because torch.bincount does not take fake tensors.
DERIVED = ("T", "row_nnz", "row_swizzle", "row_indices", "transpose_permutation")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer:UserWarning")
OPS = ("sddmm", "spmm", "csr_add", "csr_gather")


def fresh() -> CsrPattern:
    return uniform_pattern(37, 53, 0.1, seed=1)


def tensors_of(derived: object) -> list[Tensor]:
    if isinstance(derived, CsrPattern):
        return [derived.crow_indices, derived.col_indices]
    return [derived]


def assert_real(pattern: CsrPattern, name: str) -> None:
    """The derived structure `name` has real tensors, equal to those of a new pattern."""
    for got, expected in zip(
        tensors_of(getattr(pattern, name)), tensors_of(getattr(fresh(), name)), strict=True
    ):
        assert type(got) is Tensor
        assert not torch._is_functional_tensor(got)
        assert torch.equal(got, expected)


@sweep(name=DERIVED)
def test_fake_derived_structure_is_not_kept(name: str) -> None:
    pattern = fresh()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = tensors_of(getattr(pattern, name))
    assert any(isinstance(x, FakeTensor) for x in fake)
    assert_real(pattern, name)


@sweep(name=DERIVED)
def test_functional_derived_structure_is_not_kept(name: str) -> None:
    pattern = fresh()

    def read(x: Tensor) -> Tensor:
        return x + tensors_of(getattr(pattern, name))[0].sum()

    torch.func.functionalize(read)(torch.zeros(1))
    torch.func.vmap(read)(torch.zeros(2, 1))
    assert_real(pattern, name)


@sweep(op=OPS)
def test_gradients_are_right_after_a_fake_call(op: str) -> None:
    pattern = fresh()
    run = getattr(rk, op)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = {name: x.requires_grad_() for name, x in inputs_of(op, pattern).items()}
        out = run(pattern=pattern, **inputs)
        out.sum().backward()
        assert all(isinstance(x.grad, FakeTensor) for x in inputs.values())
    gradients = []
    for used in (pattern, fresh()):
        inputs = {name: x.requires_grad_() for name, x in inputs_of(op, used).items()}
        run(pattern=used, **inputs).sum().backward()
        gradients.append([x.grad for x in inputs.values()])
    for got, expected in zip(*gradients, strict=True):
        assert type(got) is Tensor
        assert torch.equal(got, expected)


def test_a_fake_tile_plan_is_not_built() -> None:
    pattern = fresh()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="expected tensors with memory, got a FakeTensor"),
    ):
        pattern.tile_plan  # noqa: B018
    assert not pattern.has_tile_plan
    assert pattern.tile_plan.sizes.nnz == pattern.nnz


def without_memory(kind: str, x: Tensor) -> Tensor:
    if kind == "fake":
        with FakeTensorMode() as mode:
            return mode.from_tensor(x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@pytest.mark.ops(*OPS, "csr_add_", "csr_scatter_", dtypes=[torch.float32])
@sweep(kind=["fake", "meta"])
def test_native_adapters_refuse_null_addresses(kernel: object, kind: str) -> None:
    """One operand at a time has no memory. A kernel would read or write address 0."""
    if kernel.backend.split("/")[0] not in ("cpu", "simt", "cuda") or kernel.op == "csr_add":
        return  # torch's own ops run for these
    pattern = fresh().to(kernel.device)
    inputs = inputs_of(kernel.op, pattern, 5, device=kernel.device)
    index = [pattern.crow_indices, pattern.col_indices]
    options = {"sddmm": [torch.float32], "csr_add_": [1.0]}.get(kernel.op, [])
    operands = [*index, *inputs.values()]
    if "w" in inputs:
        operands = [inputs["w"], *index, *list(inputs.values())[1:]]
    for i, x in enumerate(operands):
        bad = [without_memory(kind, y) if y is x else y for y in operands]
        assert bad[i].data_ptr() == 0
        with pytest.raises((RuntimeError, ValueError), match=r"expected (tensors with memory|one)"):
            kernel.run(*bad, *options)


@sweep(op=OPS)
def test_meta_tensors_give_meta_results(op: str) -> None:
    pattern = fresh()
    there = pattern.to("meta")
    real = inputs_of(op, pattern)
    inputs = {name: without_memory("meta", x).requires_grad_() for name, x in real.items()}
    out = getattr(rk, op)(pattern=there, **inputs)
    expected = getattr(rk, op)(pattern=pattern, **real)
    assert out.device.type == "meta"
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert out.stride() == expected.stride()
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())


def test_patterns_can_have_meta_index_tensors() -> None:
    """Only the lengths of the index tensors can be validated."""
    crow, col = (torch.zeros(size, dtype=torch.int64, device="meta") for size in (4, 9))
    pattern = CsrPattern(crow, col, (3, 5))
    assert pattern.device.type == "meta"
    assert pattern.T.shape == (5, 3)
    with pytest.raises(ValueError, match="crow_indices of length m"):
        CsrPattern(crow, col, (7, 5))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_torch_jit_trace_of_spmm_works() -> None:
    pattern = fresh()
    inputs = inputs_of("spmm", pattern)
    traced: Callable[..., Tensor] = torch.jit.trace(
        lambda values, b: rk.spmm(pattern, values, b), tuple(inputs.values())
    )
    other = inputs_of("spmm", pattern, seed=1)
    assert_accurate("spmm", pattern, other, traced(*other.values()))
