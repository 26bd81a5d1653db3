"""The benchmark's masks: real masks load, and generated masks have their statistics."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numpy")

from bench import masks
from rosa_kernels import CsrPattern

SHARES = ("empty_rows", "empty_cols", "top_rows", "top_cols", "heavy_nnz")


def _mean_stats(patterns: list[CsrPattern]) -> dict[str, float]:
    stats = [pattern.stats() for pattern in patterns]
    return {name: sum(s[name] for s in stats) / len(stats) for name in stats[0]}


def _real(kind: str) -> list[CsrPattern]:
    return [masks.real(name) for name in masks.real_names() if name.endswith(f".{kind}")]


def test_all_21_real_masks_have_the_stated_density():
    assert len(masks.real_names()) == 21
    for name in masks.real_names():
        assert masks.real(name).density == pytest.approx(0.006, rel=1e-3)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_generated_masks_have_the_statistics_of_real_ones(kind):
    # The three real masks of a kind differ from each other by up to 0.6 in a share. A generated
    # mask represents their mean.
    real = _real(kind)
    m, n = real[0].shape
    want = _mean_stats(real)
    got = _mean_stats([masks.generated(kind, m, n, 0.006, seed) for seed in range(2)])
    for name in SHARES:
        assert got[name] == pytest.approx(want[name], abs=0.1), name
    one_tile = 64 * 64 / (m * n)  # k_proj and v_proj have 27 tiles in all
    tolerance = max(0.15 * want["heavy_tiles"], one_tile)
    assert got["heavy_tiles"] == pytest.approx(want["heavy_tiles"], abs=tolerance)
    assert got["row_cov"] == pytest.approx(want["row_cov"], rel=0.35)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_generated_masks_stay_concentrated_at_a_larger_shape(kind):
    # Replicated real masks hold at least 97 % of their nnz in 2-4 % of the 64 x 64 tiles. In a
    # uniform mask of this density, tiles have a density of 0.6 % on average, and none stand out.
    pattern = masks.generated(kind, 1536, 1536, 0.006)
    stats = pattern.stats()
    assert 0.015 <= stats["heavy_tiles"] <= 0.09
    assert stats["heavy_nnz"] >= 0.93
    assert masks.uniform(1536, 1536, 0.006).stats()["top_cols"] < 0.2 < stats["top_cols"]


def test_uniform_masks_are_not_concentrated():
    stats = masks.uniform(1024, 1024, 0.02).stats()
    assert stats["empty_rows"] == 0
    assert stats["top_rows"] < 0.15


@pytest.mark.parametrize("mask", ["uniform", "q_proj"])
def test_masks_have_the_requested_shape_density_and_seed(mask):
    pattern = masks.pattern_of(mask, 96, 64, 0.05, 1)
    assert pattern.shape == (96, 64)
    assert pattern.nnz == round(0.05 * 96 * 64)
    again, other = (masks.pattern_of(mask, 96, 64, 0.05, seed) for seed in (1, 2))
    assert torch.equal(pattern.col_indices, again.col_indices)
    assert not torch.equal(pattern.col_indices, other.col_indices)


@pytest.mark.parametrize("mask", ["uniform", "v_proj"])
def test_masks_may_have_no_entries(mask):
    assert masks.pattern_of(mask, 8, 8, 0.0).nnz == 0


def test_replicate_repeats_the_mask_down_and_across():
    pattern = CsrPattern.from_mask(torch.tensor([[1, 0, 0], [0, 0, 1]]))
    dense = pattern.to_torch(torch.ones(2)).to_dense()
    tiled = masks.replicate(pattern, 3, 2)
    assert torch.equal(tiled.to_torch(torch.ones(12)).to_dense(), dense.repeat(3, 2))


def test_a_real_mask_fills_multiples_of_its_shape():
    pattern = masks.pattern_of("real:14.q_proj", 1152, 576, 0.0)
    assert pattern.shape == (1152, 576)
    assert pattern.density == pytest.approx(0.006, rel=1e-3)


@pytest.mark.parametrize(
    ("mask", "shape", "message"),
    [
        ("unifrom", (8, 8), "expected 'uniform', a layer kind among"),
        ("real:7.q_proj", (576, 576), "expected a mask among .*14.q_proj.*, got '7.q_proj'"),
        ("real:14.q_proj", (600, 576), r"multiple of real:14.q_proj's shape .*, got \(600, 576\)"),
    ],
)
def test_an_unknown_mask_is_refused(mask, shape, message):
    with pytest.raises(ValueError, match=message):
        masks.pattern_of(mask, *shape, 0.1)
