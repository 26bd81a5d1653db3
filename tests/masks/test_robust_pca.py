"""Principal component pursuit on matrices whose decomposition is known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from docs.figures.rpca_frames import FRAMES, video
from rosa_kernels.masks.robust_pca import rpca

float64 = torch.float64


def worked_example() -> tuple[Tensor, Tensor]:
    """A 3 x 3 matrix of rank 2 (row 3 = 1.5 row 1 + 1.25 row 2), and one outlier of 100."""
    low_rank = torch.tensor([[4, 6, 0], [4, 0, 4], [11, 9, 5]], dtype=float64)
    outlier = torch.zeros(3, 3, dtype=float64)
    outlier[2, 1] = 100
    return low_rank, outlier


def test_worked_example_is_recovered() -> None:
    low_rank, outlier = worked_example()
    assert torch.linalg.matrix_rank(low_rank) == 2
    found, sparse = rpca(low_rank + outlier)
    torch.testing.assert_close(found, low_rank, rtol=0, atol=1e-4)
    torch.testing.assert_close(sparse, outlier, rtol=0, atol=1e-4)
    assert sparse.nonzero().tolist() == [[2, 1]]
    assert torch.linalg.matrix_rank(found, atol=1e-3) == 2


def test_worked_example_has_a_dual_certificate() -> None:
    # A dual certificate proves that L and S are the pursuit's only solution (Candès 2009, section
    # 2.3). It is a matrix U V^T + W, where W lies outside L's row and column space and has norm
    # below 1. It equals lam at the outlier, and is smaller than lam elsewhere. The outlier's size
    # does not matter. Few 3 x 3 matrices have a certificate.
    low_rank, outlier = worked_example()
    lam = 1 / math.sqrt(3)
    u, _, vh = torch.linalg.svd(low_rank)
    polar, normal = u[:, :2] @ vh[:2], torch.outer(u[:, 2], vh[2])
    w = (lam - polar[2, 1]) / normal[2, 1]
    certificate = polar + w * normal
    assert abs(w) < 0.99
    assert certificate[2, 1].item() == pytest.approx(lam)
    assert certificate[outlier == 0].abs().max() < 0.99 * lam


def planted(m: int, n: int, rank: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n)
    a = torch.randn(m, rank, generator=generator, dtype=dtype)
    b = torch.randn(rank, n, generator=generator, dtype=dtype)
    spots = torch.rand(m, n, generator=generator) < share
    # Errors have a magnitude of at least 1, so that rounding does not decide where they are.
    errors = torch.randn(m, n, generator=generator, dtype=dtype) * 10
    errors = errors + errors.sign()
    return a @ b, torch.where(spots, errors, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "rank", "share"),
    [(60, 60, 3, 0.05), (60, 150, 4, 0.05), (150, 60, 4, 0.05), (100, 100, 5, 0.1)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_planted_low_rank_and_errors_are_recovered(
    m: int, n: int, rank: int, share: float, dtype: torch.dtype, scale: float
) -> None:
    low_rank, errors = planted(m, n, rank, share, dtype)
    matrix = (low_rank + errors) * scale
    before = matrix.clone()
    found, sparse = rpca(matrix)
    assert found.dtype == sparse.dtype == dtype
    torch.testing.assert_close(matrix, before, rtol=0, atol=0)
    error = torch.linalg.norm(found / scale - low_rank) / torch.linalg.norm(low_rank)
    assert error < (1e-5 if dtype == torch.float32 else 1e-6)
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-4) == rank
    # Every error is found at its place, and all other entries are small.
    assert bool((sparse[errors != 0] != 0).all())
    assert (sparse[errors == 0] / scale).abs().max() < 1e-3


def test_video_people_are_separated_from_the_background() -> None:
    frames, background = video()
    low_rank, sparse = rpca(frames)
    moving = frames != background
    assert 0.01 < moving.double().mean() < 0.1
    # The background is also recovered behind the people. Grey levels run from 0 to 1.
    assert (low_rank - background).abs().max() < 1e-4
    assert (sparse - (frames - background)).abs().max() < 1e-4
    # All visible differences, of more than 0.1, are found. All found entries are people.
    visible = (frames - background).abs() > 0.1
    found = sparse.abs() > 0.05
    assert bool(found[visible].all())
    assert not bool(found[~moving].any())
    assert found.sum(dim=0).min() > 0
    assert frames.shape[1] == FRAMES


def test_a_low_rank_matrix_has_no_outliers() -> None:
    low_rank, _ = planted(60, 60, 2, 0.0, float64)
    found, sparse = rpca(low_rank)
    assert sparse.abs().max() < 1e-5
    torch.testing.assert_close(found, low_rank, rtol=0, atol=1e-5)


def test_zero_matrix_and_single_element() -> None:
    for part in rpca(torch.zeros(4, 7)):
        assert part.equal(torch.zeros(4, 7))
    low_rank, sparse = rpca(torch.full((1, 1), 3.0))
    assert (low_rank + sparse).item() == pytest.approx(3.0, rel=1e-5)


def test_lam_balances_low_rank_and_sparse_parts() -> None:
    low_rank, errors = planted(60, 60, 3, 0.05, float64)
    matrix = low_rank + errors
    # A large lam puts everything into the low-rank part, a small lam into the sparse part.
    assert not bool(rpca(matrix, lam=10.0)[1].any())
    assert rpca(matrix, lam=1e-3)[0].abs().max() < 1e-6


def test_missing_convergence_gives_a_warning() -> None:
    low_rank, errors = planted(60, 60, 3, 0.05, float64)
    with pytest.warns(RuntimeWarning, match="expected to converge to 1e-07 within 3 iterations"):
        rpca(low_rank + errors, max_iterations=3)


@pytest.mark.parametrize(
    ("matrix", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "a float32 or float64 tensor, got list"),
        (torch.ones(2, 2, dtype=torch.float16), {}, TypeError, "got torch.float16"),
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "got torch.int64"),
        (torch.ones(4), {}, ValueError, "got shape (4,)"),
        (torch.ones(0, 4), {}, ValueError, "got shape (0, 4)"),
        (torch.tensor([[1.0, math.nan]]), {}, ValueError, "a finite matrix, got NaN or infinity"),
        (torch.ones(2, 2), {"lam": 0.0}, ValueError, "lam > 0, got 0.0"),
        (torch.ones(2, 2), {"lam": math.nan}, ValueError, "lam > 0, got nan"),
        (torch.ones(2, 2), {"tolerance": -1.0}, ValueError, "tolerance > 0, got -1.0"),
        (torch.ones(2, 2), {"max_iterations": 0}, ValueError, "max_iterations > 0, got 0"),
    ],
)
def test_bad_arguments_are_refused(
    matrix: object, options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rpca(matrix, **options)
