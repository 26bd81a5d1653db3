"""Forward-mode AD and the transforms of torch.func: the same results as for dense torch ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import inputs_of, sweep
from torch import Tensor
from torch.autograd import forward_ad

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import uniform_pattern

DIFFERENTIABLE = ("sddmm", "spmm", "csr_add", "csr_gather", "rosa_linear")
PATTERN = uniform_pattern(5, 7, 0.3, seed=1)
ROWS, COLS = PATTERN.row_indices.long(), PATTERN.col_indices.long()


def dense(values: Tensor) -> Tensor:
    """S as a dense matrix, by ops that torch can transform."""
    return torch.zeros(PATTERN.shape, dtype=values.dtype).index_put((ROWS, COLS), values)


def linear(x: Tensor, weight: Tensor, values: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return x @ (weight + dense(values)).T + 0.5 * x @ lora_a.T @ lora_b.T


# Each op, and the same formula in dense torch ops.
OURS: dict[str, Callable[..., Tensor]] = {
    "sddmm": lambda a, b: rk.sddmm(PATTERN, a, b),
    "spmm": lambda values, b: rk.spmm(PATTERN, values, b),
    "csr_add": lambda w, values: rk.csr_add(w, PATTERN, values, alpha=0.5),
    "csr_gather": lambda w: rk.csr_gather(w, PATTERN),
    "rosa_linear": lambda x, weight, values, lora_a, lora_b: rk.rosa_linear(
        x, weight.detach(), PATTERN, values, lora_a, lora_b, 0.5
    ),
}
THEIRS: dict[str, Callable[..., Tensor]] = {
    "sddmm": lambda a, b: (a @ b.T)[ROWS, COLS],
    "spmm": lambda values, b: dense(values) @ b,
    "csr_add": lambda w, values: w + 0.5 * dense(values),
    "csr_gather": lambda w: w[ROWS, COLS],
    "rosa_linear": lambda x, weight, *rest: linear(x, weight.detach(), *rest),
}


def operands(op: str, seed: int = 0) -> tuple[Tensor, ...]:
    if op != "rosa_linear":
        return tuple(inputs_of(op, PATTERN, 3, torch.float64, seed=seed).values())
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 7), (5, 7), (PATTERN.nnz,), (2, 7), (5, 2))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def assert_equal(transform: Callable[[Callable[..., Tensor]], Any], op: str) -> None:
    got, expected = transform(OURS[op]), transform(THEIRS[op])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert any(bool(x.any()) for x in torch.utils._pytree.tree_leaves(got))


@sweep(op=DIFFERENTIABLE)
def test_jvp_equals_that_of_dense_ops(op: str) -> None:
    x, tangents = operands(op), operands(op, seed=1)
    assert_equal(lambda f: torch.func.jvp(f, x, tangents), op)


@sweep(op=DIFFERENTIABLE)
def test_jvp_of_one_operand_at_a_time(op: str) -> None:
    x, tangents = operands(op), operands(op, seed=1)
    for i in range(len(x)):
        if (op, i) == ("rosa_linear", 1):
            continue  # its weight is frozen

        def transform(f: Callable[..., Tensor], i: int = i) -> Any:
            return torch.func.jvp(lambda y: f(*x[:i], y, *x[i + 1 :]), (x[i],), (tangents[i],))

        assert_equal(transform, op)


@sweep(op=DIFFERENTIABLE)
def test_dual_tensors_equal_those_of_dense_ops(op: str) -> None:
    def transform(f: Callable[..., Tensor]) -> Any:
        with forward_ad.dual_level():
            pairs = zip(operands(op), operands(op, seed=1), strict=True)
            return tuple(forward_ad.unpack_dual(f(*(forward_ad.make_dual(*p) for p in pairs))))

    assert_equal(transform, op)


@sweep(op=DIFFERENTIABLE, transform=["grad", "jacrev", "jacfwd", "hessian"])
def test_derivatives_equal_those_of_dense_ops(op: str, transform: str) -> None:
    x = operands(op)
    at = tuple(i for i in range(len(x)) if (op, i) != ("rosa_linear", 1))

    def derive(f: Callable[..., Tensor]) -> Any:
        def loss(*x: Tensor) -> Tensor:
            return f(*x).sin().sum() if transform in ("grad", "hessian") else f(*x).sin()

        return getattr(torch.func, transform)(loss, argnums=at)(*x)

    assert_equal(derive, op)


@sweep(op=DIFFERENTIABLE, batched=["first", "last", "all"])
def test_vmap_equals_that_of_dense_ops(op: str, batched: str) -> None:
    x = operands(op)
    chosen = {"first": {0}, "last": {len(x) - 1}, "all": set(range(len(x)))}[batched]
    stacked = tuple(
        torch.stack([y, -2 * y, 3 * y], -1) if i in chosen else y for i, y in enumerate(x)
    )
    dims = tuple(-1 if i in chosen else None for i in range(len(x)))
    assert_equal(lambda f: torch.func.vmap(f, dims)(*stacked), op)


@sweep(op=DIFFERENTIABLE)
def test_gradients_per_sample_equal_dense_ones(op: str) -> None:
    x = operands(op)
    first = torch.stack([x[0], 2 * x[0]])

    def transform(f: Callable[..., Tensor]) -> Any:
        grad = torch.func.grad(lambda *y: f(*y).square().sum())
        return torch.func.vmap(grad, (0, *[None] * (len(x) - 1)))(first, *x[1:])

    assert_equal(transform, op)


def test_merged_layers_have_tangents_of_values() -> None:
    x, weight, values, _, _ = operands("rosa_linear")
    merged = rk.csr_add(weight, PATTERN, values)
    tangents = operands("rosa_linear", seed=1)
    primals, dots = (x, values), (tangents[0], tangents[2])
    got = torch.func.jvp(
        lambda x, v: rk.rosa_linear(x, merged, PATTERN, v, merged=True), primals, dots
    )
    expected = torch.func.jvp(lambda x, v: x @ (weight + dense(v)).T, primals, dots)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["csr_add_", "csr_scatter_"])
def test_in_place_ops_refuse_tangents(op: str) -> None:
    """torch allows no autograd for an op that changes its input. Zero tangents would be wrong."""
    w, values = operands("csr_add")
    for written in ((w, torch.ones_like(values)), (torch.ones_like(w), values)):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.clone(), x) if x is w or x is values else x.clone()
                for x in written
            ]
            with pytest.raises(RuntimeError, match=f"{op}: expected tensors without tangents, got"):
                getattr(rk, op)(duals[0], PATTERN, duals[1])
    with forward_ad.dual_level():
        got = getattr(rk, op)(w.clone(), PATTERN, values)
    assert torch.equal(got, getattr(rk, op)(w.clone(), PATTERN, values))


def test_in_place_ops_under_vmap() -> None:
    w, values = operands("csr_add")
    batch = torch.stack([w, 2 * w])
    expected = torch.stack([rk.csr_add(x, PATTERN, values) for x in batch])
    torch.func.vmap(lambda w: rk.csr_add_(w, PATTERN, values))(batch)
    assert torch.equal(batch, expected)
    with pytest.raises(RuntimeError, match="csr_add_: expected a batched target under vmap"):
        torch.func.vmap(lambda v: rk.csr_add_(w, PATTERN, v))(torch.stack([values, values]))


@pytest.mark.compiled
@sweep(op=DIFFERENTIABLE)
def test_compiled_and_eager_transforms_are_equal(op: str) -> None:
    torch._dynamo.reset()
    x, tangents = operands(op), operands(op, seed=1)

    def jvp(*x: Tensor) -> Tensor:
        return torch.func.jvp(OURS[op], x, tangents)[1]

    grad = torch.func.grad(lambda *y: OURS[op](*y).square().sum())
    for f in (jvp, grad):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*x), f(*x), rtol=1e-12, atol=1e-12)


def test_tangents_of_frozen_weights_are_kept(pattern: CsrPattern) -> None:
    x, weight, values, _, _ = operands("rosa_linear")
    _, got = torch.func.jvp(
        lambda w: rk.rosa_linear(x, w, PATTERN, values), (weight,), (torch.ones_like(weight),)
    )
    torch.testing.assert_close(got, x @ torch.ones_like(weight).T)
