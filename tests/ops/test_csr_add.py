"""csr_add and csr_add_: alpha, elements outside the pattern, and targets, also of csr_scatter_.

test_nasty_cases.py has the cases that all ops share.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.strides import overlaps_itself
from rosa_kernels.testing import LAYOUTS

# Ops that change their target, and the advice in their errors.
IN_PLACE = {"csr_add_": "use csr_add", "csr_scatter_": "pass detached tensors"}


@pytest.mark.ops("csr_add", "csr_add_")
@sweep(alpha=[0, 1, -1.0, 0.1, 1e-3, 3, 1e30, -0.0])
def test_values_are_scaled_by_alpha(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype, alpha: float
) -> None:
    check(kernel, pattern, inputs_of(kernel.op, pattern, 0, dtype, kernel.device), alpha=alpha)


@pytest.mark.ops("csr_add", "csr_add_")
def test_elements_outside_the_pattern_keep_their_bits(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """The bits of NaN payloads and signed zeros are kept too."""
    inputs = inputs_of(kernel.op, pattern, 0, dtype, kernel.device)
    outside = pattern.to_torch(torch.ones(pattern.nnz)).to_dense().to(kernel.device) == 0
    w = inputs["w"]
    w[outside] = -0.0
    w[outside & (torch.arange(53, device=w.device) % 2 == 0)] = torch.nan
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    before = w.clone().view(bits)[outside]
    got = kernel(pattern.to(kernel.device), **inputs)
    assert torch.equal(got.view(bits)[outside], before)


@pytest.mark.ops("csr_add_")
@sweep(order=["row-major", "token-major"])
def test_adding_to_a_slice_changes_nothing_else(
    kernel: Served, pattern: CsrPattern, order: str, dtype: torch.dtype
) -> None:
    inputs = inputs_of("csr_add_", pattern, 0, dtype, kernel.device)
    m, n = pattern.shape
    base = torch.randn(3 * m + 2, 2 * n + 5).to(dtype).to(kernel.device)
    if order == "token-major":
        base = base.T.contiguous().T
    view = base[1 : 3 * m + 1 : 3, 2 : 2 * n + 2 : 2]
    before = base.clone()
    check(kernel, pattern, {**inputs, "w": view})
    assert not torch.equal(view, before[1 : 3 * m + 1 : 3, 2 : 2 * n + 2 : 2])
    view.copy_(before[1 : 3 * m + 1 : 3, 2 : 2 * n + 2 : 2])
    assert torch.equal(base, before)


@pytest.mark.ops(*IN_PLACE)
def test_in_place_ops_return_their_target(kernel: Served, pattern: CsrPattern) -> None:
    inputs = inputs_of(kernel.op, pattern, 0, device=kernel.device)
    version = inputs["w"]._version
    assert kernel(pattern.to(kernel.device), **inputs) is inputs["w"]
    assert inputs["w"]._version > version


@pytest.mark.ops("csr_add", dtypes=[torch.float32])
@sweep(order=["row-major", "token-major"])
def test_the_result_is_new_and_ordered_like_w(
    kernel: Served, pattern: CsrPattern, order: str
) -> None:
    inputs = inputs_of("csr_add", pattern, 0, device=kernel.device)
    inputs["w"] = LAYOUTS[order](inputs["w"])
    got = check(kernel, pattern, inputs)
    assert got.stride() == inputs["w"].stride()
    assert got.data_ptr() != inputs["w"].data_ptr()
    empty = CsrPattern.from_mask(torch.zeros(pattern.shape)).to(kernel.device)
    copy = kernel(empty, w=inputs["w"], values=inputs["values"][:0])
    assert torch.equal(copy, inputs["w"])
    assert copy.data_ptr() != inputs["w"].data_ptr()


@pytest.mark.ops("csr_add", "csr_add_", dtypes=[torch.bfloat16])
def test_float32_values_are_rounded_once(kernel: Served) -> None:
    """1 + (2**-8 + 2**-20) rounds up to 1 + 2**-7. With values rounded first, it would not."""
    pattern = CsrPattern.from_mask(torch.ones(1, 1)).to(kernel.device)
    w = torch.ones(1, 1, dtype=torch.bfloat16, device=kernel.device)
    values = torch.tensor([2.0**-8 + 2.0**-20], device=kernel.device)
    assert kernel(pattern, w=w, values=values).item() == 1 + 2.0**-7


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("name", [n for n in LAYOUTS if n.startswith("stride-")])
def test_a_target_that_overlaps_itself_is_refused(pattern: CsrPattern, name: str, op: str) -> None:
    inputs = inputs_of(op, pattern, 0)
    w = LAYOUTS[name](inputs["w"])
    assert overlaps_itself(w)
    before = w.clone()
    message = (
        rf"{op}: expected a target whose elements do not share memory, got shape \(37, 53\) "
        rf"with strides \({w.stride(0)}, {w.stride(1)}\); call clone\(\) first"
    )
    with pytest.raises(RuntimeError, match=message):
        getattr(rk, op)(w, pattern, inputs["values"])
    assert torch.equal(w, before)


@pytest.mark.parametrize("op", IN_PLACE)
def test_values_inside_the_target_are_refused(pattern: CsrPattern, op: str) -> None:
    w = torch.randn(pattern.shape)
    before = w.clone()
    with pytest.raises(RuntimeError, match=rf"{op}: expected values that share no memory with the"):
        getattr(rk, op)(w, pattern, w.view(-1)[: pattern.nnz])
    assert torch.equal(w, before)
    both = torch.randn(w.numel() + pattern.nnz)  # neighbours in one storage
    getattr(rk, op)(both[: w.numel()].view(pattern.shape), pattern, both[w.numel() :])


def make_leaf(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def make_result(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_() * 1


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("grad", [make_leaf, make_result])
def test_a_target_that_requires_grad_is_refused(
    pattern: CsrPattern, grad: Callable[[torch.Tensor], torch.Tensor], op: str
) -> None:
    inputs = inputs_of(op, pattern, 0)
    w = grad(inputs["w"])
    message = f"{op}: expected a target that does not require grad, got one that does; "
    message += f"{IN_PLACE[op]}, or pass w.detach"
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(RuntimeError, match=message):
            getattr(rk, op)(w, pattern, inputs["values"])


@pytest.mark.parametrize("op", IN_PLACE)
def test_values_that_require_grad_are_refused(pattern: CsrPattern, op: str) -> None:
    """A gradient would be lost silently. Without grad mode there is no gradient to lose."""
    inputs = inputs_of(op, pattern, 0)
    values = inputs["values"].clone().requires_grad_()
    message = f"{op}: expected values that do not require grad in grad mode, got values that do; "
    message += f"{IN_PLACE[op]}, or"
    with pytest.raises(RuntimeError, match=message):
        getattr(rk, op)(inputs["w"], pattern, values)
    expected = getattr(rk, op)(inputs["w"].clone(), pattern, inputs["values"])
    with torch.no_grad():
        got = getattr(rk, op)(inputs["w"], pattern, values)
    assert torch.equal(got, expected)
    assert not got.requires_grad


@pytest.mark.parametrize("op", IN_PLACE)
def test_inference_tensors_are_refused_outside_inference_mode(pattern: CsrPattern, op: str) -> None:
    """torch's own in-place ops refuse them too."""
    inputs = inputs_of(op, pattern, 0)
    with torch.inference_mode():
        w = inputs["w"].clone()
        getattr(rk, op)(w, pattern, inputs["values"])
    before = w.clone()
    with pytest.raises(RuntimeError, match=f"{op}: expected a target that may be written outside"):
        getattr(rk, op)(w, pattern, inputs["values"])
    assert torch.equal(w, before)


def test_a_parameters_data_can_be_the_target(pattern: CsrPattern) -> None:
    inputs = inputs_of("csr_add_", pattern, 0)
    weight = torch.nn.Parameter(inputs["w"].clone())
    version = weight._version
    rk.csr_add_(weight.detach(), pattern, inputs["values"])
    assert torch.equal(weight, rk.csr_add(inputs["w"], pattern, inputs["values"]))
    assert weight._version > version
