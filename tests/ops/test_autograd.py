"""Gradients of all kernels: first and second order, backends, checkpointing and autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from conftest import NARROW, Served, inputs_of, sweep
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import LAYOUTS, NASTY, assert_accurate

DIFFERENTIABLE = ("sddmm", "spmm", "csr_add", "csr_gather")


@pytest.fixture
def small() -> CsrPattern:
    """A small pattern with an empty row and column, for checks that are slow per element."""
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    return CsrPattern.from_mask(mask)


def leaves(inputs: dict[str, Tensor], layout: str = "row-major") -> dict[str, Tensor]:
    return {name: LAYOUTS[layout](x).detach().requires_grad_() for name, x in inputs.items()}


@pytest.mark.ops(*DIFFERENTIABLE, dtypes=[torch.float64])
@sweep(layout=["row-major", "token-major", "sliced"])
def test_gradients_agree_with_finite_differences(
    kernel: Served, small: CsrPattern, layout: str
) -> None:
    """Gradients of first and second order in float64, for all operands together."""
    inputs = leaves(inputs_of(kernel.op, small, 3, torch.float64, kernel.device), layout)
    small = small.to(kernel.device)

    def run(*operands: Tensor) -> Tensor:
        return kernel(small, **dict(zip(inputs, operands, strict=True)))

    operands = tuple(inputs.values())
    assert torch.autograd.gradcheck(run, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, operands, check_fwd_over_rev=True)


@pytest.mark.parametrize("order", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_csr_transpose_agrees_with_finite_differences(
    small: CsrPattern, order: Callable[..., bool]
) -> None:
    values = torch.randn(small.nnz, dtype=torch.float64, requires_grad=True)
    assert order(lambda v: rk.csr_transpose(small, v)[1], (values,))


@pytest.mark.parametrize("name", ["a", "b"])
def test_gradients_when_one_operand_requires_grad(small: CsrPattern, name: str) -> None:
    """The second order reads the other operand too. The pattern has no transpose at the start."""
    inputs = inputs_of("sddmm", small, 3, torch.float64)
    other = "ab".replace(name, "")

    def run(x: Tensor) -> Tensor:
        return rk.sddmm(small, **{name: x, other: inputs[other]})

    x = inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def assert_gradients(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], grad: Tensor, alpha: float = 1.0
) -> None:
    """Compare each gradient of `op` with the oracle of the op that computes it."""
    grads = {name: x.grad for name, x in inputs.items()}
    x = {name: x.detach() for name, x in inputs.items()}
    for name, g in grads.items():
        assert g.dtype == x[name].dtype
        assert g.shape == x[name].shape
    permutation = pattern.transpose_permutation
    if op == "sddmm":
        assert_accurate("spmm", pattern, {"values": grad, "b": x["b"]}, grads["a"])
        transposed = {"values": grad[permutation], "b": x["a"]}
        assert_accurate("spmm", pattern.T, transposed, grads["b"])
    elif op == "spmm":
        assert_accurate("sddmm", pattern, {"a": grad, "b": x["b"]}, grads["values"])
        transposed = {"values": x["values"][permutation], "b": grad}
        assert_accurate("spmm", pattern.T, transposed, grads["b"])
    elif op == "csr_add":
        assert torch.equal(grads["w"], grad)
        at_entries = grad[pattern.row_indices, pattern.col_indices]
        assert torch.equal(grads["values"], at_entries.to(x["values"].dtype) * alpha)
    else:
        assert torch.equal(grads["w"], pattern.to_torch(grad).to_dense())


@pytest.mark.ops(*DIFFERENTIABLE)
@sweep(nasty=NASTY)
def test_gradients_are_accurate(kernel: Served, nasty: CsrPattern, dtype: torch.dtype) -> None:
    inputs = leaves(inputs_of(kernel.op, nasty, 17, dtype, kernel.device), "token-major")
    pattern = nasty.to(kernel.device)
    out = kernel(pattern, **inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    out.backward(grad)
    assert_gradients(kernel.op, pattern, inputs, grad)


@pytest.mark.ops(
    "sddmm", "spmm", "csr_add",
    dtypes=NARROW, where=lambda kernel: kernel.takes_float32_values,
)  # fmt: skip
def test_gradients_with_float32_values(
    kernel: Served, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """Each gradient has its operand's dtype. Sums stay in float32 until they are rounded to it."""
    inputs = inputs_of(kernel.op, pattern, 17, dtype, kernel.device)
    if "values" in inputs:
        inputs["values"] = inputs["values"].float() * 1.001
    inputs = leaves(inputs)
    options: dict[str, object] = {
        "sddmm": {"out_dtype": torch.float32},
        "csr_add": {"alpha": 0.7},
    }.get(kernel.op, {})
    out = kernel(pattern.to(kernel.device), **inputs, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    out.backward(grad)
    assert_gradients(kernel.op, pattern, inputs, grad, alpha=float(options.get("alpha", 1.0)))


@pytest.mark.ops(*DIFFERENTIABLE)
def test_gradients_with_strides_of_0(kernel: Served, pattern: CsrPattern) -> None:
    """The backward of `sum` gives the op a gradient with strides 0."""
    inputs = inputs_of(kernel.op, pattern, 9, kernel.dtype, kernel.device)
    inputs = leaves(inputs, "token-major")
    out = kernel(pattern.to(kernel.device), **inputs)
    out.sum().backward()
    assert_gradients(kernel.op, pattern, inputs, torch.ones_like(out))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_only_requested_gradients_are_computed(op: str, pattern: CsrPattern) -> None:
    """Only a gradient of `b` needs the pattern's transpose."""
    inputs = inputs_of(op, pattern)
    for name in inputs:
        fresh = CsrPattern(pattern.crow_indices, pattern.col_indices, pattern.shape)
        x = {n: v.detach().requires_grad_(n == name) for n, v in inputs.items()}
        getattr(rk, op)(pattern=fresh, **x).sum().backward()
        assert {n for n, v in x.items() if v.grad is not None} == {name}
        assert fresh.has_transpose == (name == "b")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_nothing_is_recorded_without_grad_mode(op: str, pattern: CsrPattern) -> None:
    inputs = leaves(inputs_of(op, pattern))
    with torch.no_grad():
        assert getattr(rk, op)(pattern=pattern, **inputs).grad_fn is None
    assert getattr(rk, op)(pattern=pattern, **inputs).grad_fn is not None
    assert not pattern.has_transpose or "b" in inputs


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_add_up_over_uses_and_passes(op: str, pattern: CsrPattern) -> None:
    """Two uses in one graph and two backward passes give four times the gradient."""
    once, often = leaves(inputs_of(op, pattern)), leaves(inputs_of(op, pattern))
    getattr(rk, op)(pattern=pattern, **once).sum().backward()
    total = sum(getattr(rk, op)(pattern=pattern, **often).sum() for _ in range(2))
    total.backward(retain_graph=True)
    total.backward()
    for name, x in once.items():
        assert torch.equal(often[name].grad, 4 * x.grad)


@pytest.mark.parametrize(
    ("op", "name"), [("sddmm", "a"), ("sddmm", "b"), ("spmm", "values"), ("spmm", "b")]
)
@pytest.mark.parametrize("write", ["torch", "csr_add_"])
def test_changed_saved_operands_raise_in_backward(
    op: str, name: str, write: str, pattern: CsrPattern
) -> None:
    """The gradients would be wrong. csr_add_ counts as a write, like torch's own in-place ops."""
    x = leaves(inputs_of(op, pattern))
    inputs = {n: v * 1 for n, v in x.items()}
    out = getattr(rk, op)(pattern=pattern, **inputs)
    target = inputs[name].detach()
    if write == "torch":
        target.add_(1)
    else:
        target = target[None] if target.dim() == 1 else target
        full = CsrPattern.from_mask(torch.ones(target.shape))
        rk.csr_add_(target, full, torch.ones(full.nnz))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changed_index_tensors_raise_in_backward(pattern: CsrPattern) -> None:
    out = rk.spmm(pattern, **leaves(inputs_of("spmm", pattern)))
    pattern.col_indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- the backend of a backward -------------------------------------------------------------------


@pytest.fixture
def probe(sandbox: None) -> list[str]:
    """The log of calls to a backend "probe": the reference kernels, which run only by that name."""
    log: list[str] = []

    def record(op: str, run: Callable[..., object]) -> Callable[..., object]:
        def recorded(*args: object) -> object:
            log.append(op)
            return run(*args)

        return recorded

    for kernel in rk.kernels():
        if kernel.backend == "reference" and kernel.op != "csr_transpose":
            rk.register(
                kernel.op,
                "probe",
                devices=set(kernel.devices),
                dtypes=set(kernel.dtypes),
                priority=-1,
            )(record(kernel.op, kernel.run))
    return log


# For each op, the ops whose kernels run in forward and in backward.
CALLS = {
    "sddmm": (["sddmm"], ["spmm", "spmm"]),
    "spmm": (["spmm"], ["sddmm", "spmm"]),
    "csr_add": (["csr_add_"], ["csr_gather"]),
    "csr_gather": (["csr_gather"], ["csr_add_"]),
}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("ask", ["context", "argument", "environment"])
def test_backward_uses_the_backend_of_forward(
    op: str, ask: str, pattern: CsrPattern, probe: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward uses it after the `use_backend` block and in another thread.

    A backend that is requested at the time of the backward has no effect.
    """
    inputs = leaves(inputs_of(op, pattern))
    run = getattr(rk, op)
    if ask == "context":
        with rk.use_backend("probe"):
            out = run(pattern=pattern, **inputs)
    elif ask == "argument":
        out = run(pattern=pattern, **inputs, backend="probe")
    else:
        monkeypatch.setenv("ROSA_BACKEND", "probe")
        out = run(pattern=pattern, **inputs)
        monkeypatch.delenv("ROSA_BACKEND")
    forward, backward = CALLS[op]
    assert probe == forward
    with rk.use_backend("reference"):
        thread = threading.Thread(target=out.sum().backward)
        thread.start()
        thread.join()
    assert probe == forward + backward
    assert all(x.grad is not None for x in inputs.values())


# -- checkpointing and autocast --------------------------------------------------------------------


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_checkpointing_keeps_backend_and_gradients(
    op: str, pattern: CsrPattern, probe: list[str]
) -> None:
    """Checkpointing is non-reentrant. The recomputed forward uses the backend of the first one."""

    def block(*operands: Tensor) -> Tensor:
        return getattr(rk, op)(pattern=pattern, **dict(zip(inputs, operands, strict=True))).sin()

    plain, inputs = leaves(inputs_of(op, pattern)), leaves(inputs_of(op, pattern))
    with rk.use_backend("probe"):
        block(*plain.values()).sum().backward()
        before = len(probe)
        checkpoint(block, *inputs.values(), use_reentrant=False).sum().backward()
    forward, backward = CALLS[op]
    assert probe[before:] == forward + forward + backward
    for name, x in plain.items():
        assert torch.equal(inputs[name].grad, x.grad)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_autocast_casts_dense_operands(op: str, narrow: torch.dtype, pattern: CsrPattern) -> None:
    """Dense operands are cast as for a matmul. The values stay in float32."""
    inputs = leaves(inputs_of(op, pattern, 17))
    with torch.autocast("cpu", narrow):
        out = getattr(rk, op)(pattern=pattern, **inputs)
    assert out.dtype == narrow
    rounded = {n: x.detach() if n == "values" else x.detach().to(narrow) for n, x in inputs.items()}
    assert_accurate(op, pattern, rounded, out)
    out.sum().backward()
    by_hand = leaves(rounded)
    getattr(rk, op)(pattern=pattern, **by_hand).sum().backward()
    for name, x in inputs.items():
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, by_hand[name].grad.float())


def test_autocast_with_mixed_dtypes(pattern: CsrPattern) -> None:
    """One operand is float32, the other bfloat16, and the output is float32."""
    inputs = inputs_of("sddmm", pattern)
    with torch.autocast("cpu", torch.bfloat16):
        out = rk.sddmm(pattern, inputs["a"], inputs["b"].bfloat16(), out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_accurate("sddmm", pattern, {n: x.bfloat16() for n, x in inputs.items()}, out)


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_autocast_does_not_cast_float64(op: str, pattern: CsrPattern) -> None:
    inputs = inputs_of(op, pattern, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = getattr(rk, op)(pattern=pattern, **inputs)
    assert out.dtype == torch.float64
    assert_accurate(op, pattern, inputs, out)
