"""Robust PCA: a matrix as low rank + sparse, by principal component pursuit."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

# Relative residuals at which to stop. Below 1e-6 those of float32 are rounding errors.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-7}


@torch.no_grad()
def rpca(
    matrix: Tensor,
    *,
    lam: float | None = None,
    tolerance: float | None = None,
    max_iterations: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Split a matrix M into L of low rank and a sparse S by principal component pursuit.

    minimise ||L||_* + lam ||S||_1 subject to L + S = M (nuclear norm; sum of magnitudes), by
    alternating directions: with a multiplier Y and a penalty mu,
    L = D_{1/mu}(M - S + Y / mu), which shrinks singular values; S = S_{lam/mu}(M - L + Y / mu),
    which shrinks entries; Y += mu (M - L - S). mu starts at m n / (4 ||M||_1) and is doubled or
    halved while one of the two residuals is 10 times the other (for the first 200 iterations, after
    which a fixed mu makes it converge for certain).

    For most M that are a sum of a low-rank matrix whose singular vectors are not sparse and of
    errors of any size at scattered places, the solution is exactly these two.

    One iteration costs an SVD of M, and memory is 12 times M's, most of it the SVD's.

    Args:
        matrix: (m, n), float32 or float64, on any device.
        lam: cost of a sparse entry; 1 / sqrt(max(m, n)) by default, for which recovery is proven.
        tolerance: stops when ||M - L - S||_F and the last change of S are both below this times
            ||M||_F; 1e-6 by default, 1e-7 in float64.
        max_iterations: a RuntimeWarning tells when they did not suffice.

    Returns:
        L, S: (m, n), of M's dtype and device. S has exact zeros, and L + S = M to the tolerance.

    Raises:
        TypeError: not a float32 or float64 tensor.
        ValueError: not 2-D, not finite, or options that are not positive.

    Source: Candès, Li, Ma, Wright, Robust principal component analysis?, arXiv 0912.3599.
    """
    lam, tolerance = _check(matrix, lam, tolerance, max_iterations)
    m, n = matrix.shape
    norm = float(torch.linalg.vector_norm(matrix))
    if norm == 0:
        return torch.zeros_like(matrix), torch.zeros_like(matrix)
    # As a matrix of norm 1: mu and Y are then of an ordinary size whatever M's scale.
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
