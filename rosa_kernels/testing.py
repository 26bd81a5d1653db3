"""What tests and benchmarks share: cases, their inputs, the oracle and the accuracy policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.backends import reference
from rosa_kernels.pattern import CsrPattern

OPS = ("sddmm", "spmm", "csr_add", "csr_gather")
_UNIT_ROUNDOFF = {torch.float64: 2.0**-53}
_FLOAT32_ROUNDOFF = 2.0**-24  # of every narrower dtype too: they accumulate in float32


@dataclass(frozen=True)
class Case:
    """One problem: an op on an (m, n) pattern with reduction or width k.

    Attributes:
        op: one of OPS.
        m, n: shape of the pattern.
        k: tokens; columns of the dense operands (unused by csr_add and csr_gather).
        density: nnz / (m * n).
        dtype: of the dense operands.
        mask: how the pattern is made: "uniform", or a name the caller resolves.
        seed: of the pattern and the inputs.
    """

    op: str
    m: int
    n: int
    k: int
    density: float
    dtype: torch.dtype = torch.float32
    mask: str = "uniform"
    seed: int = 0


def uniform_pattern(m: int, n: int, density: float, seed: int = 0) -> CsrPattern:
    """floor(density * m * n) nonzeros, every position equally likely."""
    generator = torch.Generator().manual_seed(seed)
    nnz = int(density * m * n)
    flat = torch.randperm(m * n, generator=generator)[:nnz] if nnz else torch.empty(0).long()
    return CsrPattern.from_coo(flat // max(n, 1), flat % max(n, 1), (m, n))


def token_major(rows: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A normal (rows, k) matrix whose columns (tokens) are contiguous in memory."""
    return torch.randn(k, rows, generator=generator).to(dtype).t()


def make_inputs(case: Case, pattern: CsrPattern, device: str = "cpu") -> dict[str, Tensor]:
    """Standard normal inputs of a case, by argument name, dense operands token-major."""
    generator = torch.Generator().manual_seed(case.seed)
    if case.op == "sddmm":
        inputs = {
            "a": token_major(case.m, case.k, case.dtype, generator),
            "b": token_major(case.n, case.k, case.dtype, generator),
        }
    elif case.op == "spmm":
        inputs = {
            "values": torch.randn(pattern.nnz, generator=generator).to(case.dtype),
            "b": token_major(case.n, case.k, case.dtype, generator),
        }
    elif case.op in ("csr_add", "csr_add_", "csr_gather"):
        inputs = {"w": torch.randn(case.m, case.n, generator=generator).to(case.dtype)}
        if case.op != "csr_gather":
            inputs["values"] = torch.randn(pattern.nnz, generator=generator).to(case.dtype)
    else:
        raise ValueError(f"make_inputs: expected an op among {OPS}, got {case.op!r}")
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def oracle(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], *, alpha: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | int]:
    """The exact result in float64, and what the error bound is made of.

    Returns:
        (reference, scale, k): the float64 result on the inputs as rounded to their dtype; the norm
        ||a o b||_2 of the products behind each element; their number.
    """
    wide = {name: tensor.detach().double() for name, tensor in inputs.items()}
    crow, col = pattern.crow_indices, pattern.col_indices
    if op == "sddmm":
        a, b = wide["a"], wide["b"]
        ref = reference.sddmm(crow, col, a, b, torch.float64)
        squares = reference.sddmm(crow, col, a.square(), b.square(), torch.float64)
        return ref, squares.sqrt(), a.shape[1]
    if op == "spmm":
        values, b = wide["values"], wide["b"]
        ref = reference.spmm(crow, col, values, b)
        squares = reference.spmm(crow, col, values.square(), b.square())
        return ref, squares.sqrt(), pattern.row_nnz[:, None]
    if op == "csr_gather":
        ref = reference.csr_gather(wide["w"], crow, col)
        return ref, torch.zeros_like(ref), 0
    if op in ("csr_add", "csr_add_"):
        ref = wide["w"].clone()
        reference.csr_add_(ref, crow, col, wide["values"], alpha)
        scale = torch.zeros_like(ref)
        at = (pattern.row_indices.long(), col.long())
        # Two roundings of the product and the sum, at most.
        scale[at] = (wide["w"][at].square() + (alpha * wide["values"]).square()).sqrt()
        return ref, scale, pattern.to_torch(torch.ones(pattern.nnz)).to_dense()
    raise ValueError(f"oracle: expected an op among {OPS}, got {op!r}")


def assert_accurate(
    op: str,
    pattern: CsrPattern,
    inputs: dict[str, Tensor],
    got: Tensor,
    *,
    alpha: float = 1.0,
    adversarial: bool = False,
) -> None:
    """Assert that `got` is `op`'s result within the one accuracy policy of this project.

    With the float64 result ref on the rounded inputs, k products behind an element and the unit
    roundoff u of the accumulation (2**-24; 2**-53 for float64), e = 4 sqrt(k) u (||a o b||_2 +
    |ref|), and it passes iff round(ref - e) <= got <= round(ref + e), rounded to got's dtype. On
    `adversarial` data, whose rounding errors do not average out, e = k u sum |a_i b_i|.

    A NaN passes only where the exact result is one.

    Raises:
        AssertionError: with the worst element, its coordinate and the bound.
    """
    ref, scale, k = oracle(op, pattern, inputs, alpha=alpha)
    if adversarial:
        magnitudes = {name: tensor.abs() for name, tensor in inputs.items()}
        scale = oracle(op, pattern, magnitudes, alpha=abs(alpha))[0]
    assert_within_bound(op, got, ref, scale, k, inputs, adversarial=adversarial)


def assert_within_bound(
    op: str,
    got: Tensor,
    ref: Tensor,
    scale: Tensor,
    k: Tensor | int,
    inputs: dict[str, Tensor],
    *,
    adversarial: bool = False,
) -> None:
    """The comparison behind :func:`assert_accurate`, for a reference already at hand."""
    assert got.shape == ref.shape, (
        f"{op}: expected shape {tuple(ref.shape)}, got {tuple(got.shape)}"
    )
    dtype = next(iter(inputs.values())).dtype
    u = _UNIT_ROUNDOFF.get(dtype, _FLOAT32_ROUNDOFF)
    got, ref, scale = got.detach().cpu(), ref.cpu(), scale.cpu()
    k = k.cpu().double() if isinstance(k, Tensor) else torch.tensor(float(k))
    bound = k * u * scale if adversarial else 4 * k.sqrt() * u * (scale + ref.abs())
    bound = torch.where(ref.isinf(), 0.0, bound)  # an exact Inf is met exactly: Inf - Inf is NaN
    low, high = (ref - bound).to(got.dtype), (ref + bound).to(got.dtype)
    ok = (low <= got) & (got <= high) | (got.isnan() & ref.isnan())
    if bool(ok.all()):
        return
    error = torch.where(ok, 0.0, (got.double() - ref).abs()).nan_to_num(nan=math.inf)
    worst = int(error.flatten().argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ref.shape))
    raise AssertionError(
        f"{op}: {int((~ok).sum())} of {ok.numel()} elements outside the bound; worst at {where}: "
        f"expected {ref[where]:.9g} +- {bound.expand_as(ref)[where]:.3g}, got {got[where]:.9g}"
    )


def max_error(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], got: Tensor, **options: Any
) -> float:
    """The largest |got - ref| / (||a o b||_2 + |ref|): relative, and survives cancellation."""
    ref, scale, _ = oracle(op, pattern, inputs, **options)
    size = scale + ref.abs()
    error = (got.detach().double() - ref).abs() / torch.where(size > 0, size, 1.0)
    return float(error.max()) if error.numel() else 0.0
