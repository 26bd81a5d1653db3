"""Robust PCA: splits a matrix into low rank + sparse, by principal component pursuit."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# The relative residuals at which rpca stops. In float32, residuals below 1e-6 are rounding errors.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-7}


@torch.no_grad()
def rpca(
    matrix: Tensor,
    *,
    lam: float | None = None,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Split a matrix M into a low-rank L and a sparse S, by principal component pursuit.

    Formula: minimise ||L||_* + lam ||S||_1 subject to L + S = M, with the nuclear norm and the sum
    of magnitudes.

    Method: alternating directions with a multiplier Y and a penalty mu. One iteration is
    L = D_{1/mu}(M - S + Y / mu), which shrinks singular values;
    S = S_{lam/mu}(M - L + Y / mu), which shrinks entries; Y += mu (M - L - S).
    mu starts at m n / (4 ||M||_1). In the first 200 iterations, mu is doubled or halved while one
    of the two residuals is 10 times the other. Later mu is fixed, which guarantees convergence.

    Recovery: let M be a low-rank matrix plus errors of any size at scattered places. If the
    singular vectors of the low-rank matrix are not sparse, the solution for most M is exactly
    these two.

    Cost: an SVD of M for each iteration, and 12 times M's memory, most of which the SVD takes.

    Args:
        matrix: (m, n), float32 or float64, on any device.
        lam: cost of a sparse entry; by default 1 / sqrt(max(m, n)), for which recovery is proven.
        tolerance: rpca stops when ||M - L - S||_F and the last change of S are both at most this
            times ||M||_F; by default 1e-6, and 1e-7 in float64.
        max_iterations: most iterations. A RuntimeWarning says if they did not suffice.

    Returns:
        L, S: (m, n), with M's dtype and device. S has exact zeros; L + S = M up to the tolerance.

    Raises:
        TypeError: the matrix is not a float32 or float64 tensor.
        ValueError: the matrix is not 2-D, is empty or is not finite; an option is not positive.

    Source: Candès, Li, Ma, Wright, Robust principal component analysis?, arXiv 0912.3599.
    """
    lam, tolerance = _check(matrix, lam, tolerance, max_iterations)
    m, n = matrix.shape
    norm = float(torch.linalg.vector_norm(matrix))
    if norm == 0:
        return torch.zeros_like(matrix), torch.zeros_like(matrix)
    # M is scaled to norm 1, so that mu and Y have an ordinary size for every M.
    scaled = matrix / norm
    mu = m * n / (4 * float(scaled.abs().sum()))
    low_rank, sparse = torch.zeros_like(scaled), torch.zeros_like(scaled)
    dual = torch.zeros_like(scaled)  # Y / mu
    residual = change = math.inf
    for iteration in range(max_iterations):
        u, sigma, vh = torch.linalg.svd(scaled - sparse + dual, full_matrices=False)
        sigma = sigma - 1 / mu
        rank = int((sigma > 0).sum())
        torch.mm(u[:, :rank] * sigma[:rank], vh[:rank], out=low_rank)
        previous, sparse = sparse, _shrink(scaled - low_rank + dual, lam / mu)
        gap = scaled - low_rank - sparse
        dual += gap
        residual = float(torch.linalg.vector_norm(gap))
        change = float(torch.linalg.vector_norm(sparse - previous))
        if max(residual, change) <= tolerance:
            break
        if iteration < 200 and max(residual, change) > 10 * min(residual, change):
            factor = 2.0 if residual > change else 0.5
            mu *= factor
            dual /= factor
    else:
        warnings.warn(
            f"rpca: expected to converge to {tolerance:g} within {max_iterations} iterations, got "
            f"relative residuals {residual:.2g} (L + S - M) and {change:.2g} (change of S); raise "
            "max_iterations or tolerance",
            RuntimeWarning,
            stacklevel=2,
        )
    return low_rank * norm, sparse * norm


def _shrink(x: Tensor, threshold: float) -> Tensor:
    return x.sign() * (x.abs() - threshold).clamp_(min=0)


def _check(
    matrix: Tensor, lam: float | None, tolerance: float | None, max_iterations: int
) -> tuple[float, float]:
    if not isinstance(matrix, Tensor) or matrix.dtype not in _TOLERANCE:
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"rpca: expected a float32 or float64 tensor, got {got}")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(
            f"rpca: expected a matrix of at least one element, got shape {tuple(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("rpca: expected a finite matrix, got NaN or infinity")
    lam = 1 / math.sqrt(max(matrix.shape)) if lam is None else lam
    tolerance = _TOLERANCE[matrix.dtype] if tolerance is None else tolerance
    for name, value in (("lam", lam), ("tolerance", tolerance), ("max_iterations", max_iterations)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"rpca: expected {name} > 0, got {value}")
    return lam, tolerance
