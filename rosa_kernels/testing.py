"""Cases, their inputs, the oracle and the accuracy policy, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.backends import reference
from rosa_kernels.pattern import CsrPattern

OPS = ("sddmm", "spmm", "csr_add", "csr_gather")
_UNIT_ROUNDOFF = {torch.float64: 2.0**-53}
_FLOAT32_ROUNDOFF = 2.0**-24  # for narrower dtypes too: they accumulate in float32


@dataclass(frozen=True)
class Case:
    """One problem: an op on an (m, n) pattern with k tokens.

    Attributes:
        op: one of OPS.
        m, n: shape of the pattern.
        k: number of tokens, the columns of the dense operands. csr_add and csr_gather ignore it.
        density: nnz / (m * n).
        dtype: dtype of the dense operands.
        mask: how the pattern is made: "uniform", or a name that the caller resolves.
        seed: seed of the pattern and of the inputs.
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
    """A pattern of floor(density * m * n) nonzeros, with every position equally likely."""
    generator = torch.Generator().manual_seed(seed)
    nnz = int(density * m * n)
    flat = torch.randperm(m * n, generator=generator)[:nnz] if nnz else torch.empty(0).long()
    return CsrPattern.from_coo(flat // max(n, 1), flat % max(n, 1), (m, n))


def _powerlaw() -> CsrPattern:
    """A pattern like real masks: rows from empty to nearly full, in no order."""
    generator = torch.Generator().manual_seed(3)
    share = torch.rand(90, 1, generator=generator) ** 4
    return CsrPattern.from_mask(torch.rand(90, 70, generator=generator) < share)


def _only(m: int, n: int, rows: Any, cols: Any) -> CsrPattern:
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[rows, cols] = True
    return CsrPattern.from_mask(mask)


# Patterns that have broken a sparse kernel before.
NASTY: dict[str, Callable[[], CsrPattern]] = {
    "0x0": lambda: uniform_pattern(0, 0, 0.0),
    "0x7": lambda: uniform_pattern(0, 7, 0.0),
    "7x0": lambda: uniform_pattern(7, 0, 0.0),
    "1x1-empty": lambda: uniform_pattern(1, 1, 0.0),
    "1x1-full": lambda: uniform_pattern(1, 1, 1.0),
    "1x9": lambda: uniform_pattern(1, 9, 0.5),
    "9x1": lambda: uniform_pattern(9, 1, 0.5),
    "nnz=0": lambda: uniform_pattern(5, 7, 0.0),
    "empty-rows-and-columns": lambda: uniform_pattern(37, 29, 0.02),
    "one-full-row": lambda: _only(19, 45, 7, slice(None)),
    "last-row-only": lambda: _only(21, 33, -1, slice(None, None, 2)),
    "last-column-only": lambda: _only(33, 21, slice(None), -1),
    "corners": lambda: _only(130, 67, [0, 0, -1, -1], [0, -1, 0, -1]),
    "full": lambda: uniform_pattern(33, 31, 1.0),
    "powerlaw": _powerlaw,
    "odd-tiles": lambda: uniform_pattern(129, 65, 0.1),
    "even-tiles": lambda: uniform_pattern(128, 64, 0.1),
    "wide": lambda: uniform_pattern(3, 40_000, 0.004),
    "tall": lambda: uniform_pattern(40_000, 3, 0.004),
}


def token_major(rows: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A normal (rows, k) matrix whose columns (tokens) are contiguous in memory."""
    return torch.randn(k, rows, generator=generator, device=generator.device).to(dtype).t()


# Layouts of an operand in memory. Each function takes a contiguous tensor and returns its values in
# other memory. Layouts whose elements share memory change the values, so the oracle must read the
# returned tensor.


def _misaligned(x: Tensor) -> Tensor:
    storage = x.new_full((x.numel() + 2,), torch.nan)
    view = storage[1:-1].view(x.shape)
    return view.copy_(x)


def _sliced(x: Tensor) -> Tensor:
    storage = x.new_full([2 * size + 3 for size in x.shape], torch.nan)
    view = storage[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def _overlapping(x: Tensor) -> Tensor:
    flat = x.reshape(-1)[: max(sum(x.shape) - x.dim() + 1, 0)] if x.numel() else x.reshape(-1)
    return flat.as_strided(x.shape, (1,) * x.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda x: x.contiguous(),
    "token-major": lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    "misaligned": _misaligned,
    "misaligned-token-major": lambda x: _misaligned(x.T).T if x.dim() == 2 else _misaligned(x),
    "sliced": _sliced,
    "sliced-token-major": lambda x: _sliced(x.T).T if x.dim() == 2 else _sliced(x),
    "stride-0-rows": lambda x: x[:1].expand(x.shape),
    "stride-0-columns": lambda x: x[..., :1].expand(x.shape),
    "stride-0": lambda x: x.flatten()[0].expand(x.shape),
    "stride-1-1": _overlapping,
}


def make_inputs(case: Case, pattern: CsrPattern, device: str = "cpu") -> dict[str, Tensor]:
    """Standard normal inputs of a case, by argument name. Dense operands are token-major.

    They are drawn on `device`, because a CPU takes two seconds for 16384 tokens of 14336.
    """
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(case.dtype)

    if case.op == "sddmm":
        inputs = {
            "a": token_major(case.m, case.k, case.dtype, generator),
            "b": token_major(case.n, case.k, case.dtype, generator),
        }
    elif case.op == "spmm":
        inputs = {
            "values": normal(pattern.nnz),
            "b": token_major(case.n, case.k, case.dtype, generator),
        }
    elif case.op in ("csr_add", "csr_add_", "csr_gather", "csr_scatter_"):
        inputs = {"w": normal(case.m, case.n)}
        if case.op != "csr_gather":
            inputs["values"] = normal(pattern.nnz)
    else:
        raise ValueError(f"make_inputs: expected an op among {OPS}, got {case.op!r}")
    return inputs


def oracle(
    op: str, pattern: CsrPattern, inputs: dict[str, Tensor], *, alpha: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | int]:
    """The exact result in float64, with the terms of the error bound.

    Returns (reference, scale, k):
        reference: the float64 result for the inputs as rounded to their dtype.
        scale: for each element, the norm ||a o b||_2 of the products that it sums.
        k: for each element, the number of these products.
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
    if op == "csr_scatter_":
        ref = wide["w"].clone()
        ref[pattern.row_indices.long(), col.long()] = wide["values"]
        return ref, torch.zeros_like(ref), 0
    if op in ("csr_add", "csr_add_"):
        ref = wide["w"].clone()
        reference.csr_add_(ref, crow, col, wide["values"], alpha)
        scale = torch.zeros_like(ref)
        at = (pattern.row_indices.long(), col.long())
        # At most two values are rounded: the product and the sum.
        scale[at] = (wide["w"][at].square() + (alpha * wide["values"]).square()).sqrt()
        ones = torch.ones(pattern.nnz, device=pattern.device)
        return ref, scale, pattern.to_torch(ones).to_dense()
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

        round(ref - e) <= got <= round(ref + e),  e = 4 sqrt(k) u (||a o b||_2 + |ref|)

    ref is the float64 result for the rounded inputs. k is the number of products that an element
    sums. u is the unit roundoff of the accumulation: 2**-53 for float64, else 2**-24. round()
    rounds to got's dtype.

    Rounding errors of `adversarial` data do not average out. For such data, e = k u sum |a_i b_i|.

    A NaN passes only where the exact result is NaN.

    Raises:
        AssertionError: an element is outside its bound. The message gives the worst element, its
            coordinate and its bound.
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
    """The comparison of :func:`assert_accurate`, for a reference that is already computed."""
    assert got.shape == ref.shape, (
        f"{op}: expected shape {tuple(ref.shape)}, got {tuple(got.shape)}"
    )
    dtype = next(iter(inputs.values())).dtype
    u = _UNIT_ROUNDOFF.get(dtype, _FLOAT32_ROUNDOFF)
    got, ref, scale = got.detach().cpu(), ref.cpu(), scale.cpu()
    k = k.cpu().double() if isinstance(k, Tensor) else torch.tensor(float(k))
    bound = k * u * scale if adversarial else 4 * k.sqrt() * u * (scale + ref.abs())
    bound = torch.where(ref.isinf(), 0.0, bound)  # an Inf must be met exactly: Inf - Inf is NaN
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
    """The largest |got - ref| / (||a o b||_2 + |ref|).

    It is a relative error that stays meaningful under cancellation.
    """
    ref, scale, _ = oracle(op, pattern, inputs, **options)
    size = scale + ref.abs()
    error = (got.detach().double() - ref).abs() / torch.where(size > 0, size, 1.0)
    return float(error.max()) if error.numel() else 0.0
