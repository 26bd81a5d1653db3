"""Each score equals its definition, and needs the expected number of passes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from mask_models import (
    assert_top,
    batches,
    dense,
    dense_gradients,
    dense_scores,
    loss_of,
    tiny,
    tokens_in,
)
from torch import Tensor, nn

import rosa_kernels as rk
from rosa_kernels import CsrPattern, RosaLinear
from rosa_kernels.masks import scores, spare_memory
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.gradients import base_weight
from rosa_kernels.masks.robust_pca import rpca
from rosa_kernels.masks.scores import (
    SCORES,
    count_tokens,
    default_memory,
    forwards,
    give_scores,
    groups_within,
    one_pass_memory,
    random_scores,
)
from rosa_kernels.masks.targets import find_targets, target_shapes


def scored(model: nn.Module, score: str, data: list, memory_bytes: int | None) -> dict[str, Tensor]:
    """The scores of all targets, kept in memory together, which build_masks avoids."""
    found: dict[str, Tensor] = {}
    give_scores(
        score,
        model,
        find_targets(model),
        found.__setitem__,
        data=scores.Data(data, loss_of(model), count_tokens, None),
        seed=0,
        memory_bytes=memory_bytes,
    )
    return found


def exact_grasp(model: nn.Module, data: list, group: list[str]) -> dict[str, Tensor]:
    """W o (H g) over the group's weights, by double backward of the mean loss over all tokens."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    targets = find_targets(model)
    weights = [targets[name].weight for name in group]
    tokens = sum(tokens_in(batch) for batch in data)
    loss = sum(loss_of(model)(batch) * tokens_in(batch) / tokens for batch in data)
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    products = torch.autograd.grad(flow, weights)
    return {
        name: (w * hg).detach().T if type(targets[name]).__name__ == "Conv1D" else (w * hg).detach()
        for name, w, hg in zip(group, weights, products, strict=True)
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 2])
def test_grasp_in_one_group_matches_the_paper(family: str, count: int) -> None:
    model, data = tiny(family), batches(count)
    found = scored(model, "grasp", data, memory_bytes=10**9)
    expected = exact_grasp(model, data, list(found))
    # With several batches, gradients are not divided by the number of tokens. The scores then
    # have the positive factor tokens^2.
    tokens = 1 if count == 1 else sum(tokens_in(batch) for batch in data)
    for name, value in expected.items():
        error = (found[name] / tokens**2 - value).norm() / value.norm()
        assert error < 0.01, (name, error)


def test_grasp_of_groups_ignores_curvature_between_groups() -> None:
    model, data = tiny("llama"), batches(1)
    found = scored(model, "grasp", data, memory_bytes=None)
    groups = groups_within(target_shapes(find_targets(model)), None)
    assert len(groups) > 2
    for group in groups:
        for name, value in exact_grasp(model, data, group).items():
            assert (found[name] - value).norm() / value.norm() < 0.01


def test_grasp_keeps_the_largest_signed_score() -> None:
    # L = w1 - w1^2 / 2 + w2^2 / 2 has g = (1 - w1, w2) and H = diag(-1, 1). At (0.5, 0.5) this
    # gives W o (H g) = (-0.25, 0.25). The score is signed: w2 is kept. Removing w2 shrinks the
    # gradient, and removing w1 enlarges it.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, 0.5]])

    def loss_fn(_: object) -> Tensor:
        w = layer(torch.eye(2)).flatten()
        return w[0] - w[0] ** 2 / 2 + w[1] ** 2 / 2

    masks = build_masks(
        layer, {"l": layer}, {"l": 1}, score="grasp", batches=[None], loss_fn=loss_fn
    )
    assert masks["l"].col_indices.tolist() == [1]


def test_grasp_of_a_constant_loss_is_refused() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(
        ValueError, match=r"gradients that are not all 0 for 'l', got a norm of 0\.0"
    ):
        build_masks(
            layer,
            {"l": layer},
            {"l": 2},
            score="grasp",
            batches=[torch.randn(2, 4)],
            loss_fn=lambda x: (0 * layer(x)).sum(),
        )


def test_rpca_scores_sparse_part_of_mean_gradient() -> None:
    model, data = tiny("llama"), batches(2)
    found = scored(model, "rpca", data, memory_bytes=None)
    gradients = dense_gradients(model, data)
    for name, score in found.items():
        mean = sum(tokens_in(batch) * g[name] for batch, g in zip(data, gradients, strict=True))
        _, sparse = rpca(mean.double())
        size = sparse.abs().max()
        support = sparse.abs() > 1e-2 * size
        assert support.any()
        torch.testing.assert_close(
            score.double()[support], sparse.abs()[support], rtol=0.05, atol=5e-3 * float(size)
        )
        # Outside S, entries are ranked by the gradient, and stay below all entries of S.
        _, at_this_tolerance = rpca(mean, tolerance=1e-4)
        inside = at_this_tolerance != 0
        if not bool(inside.all()):
            assert score[~inside].max() <= score[inside].min() * 1.01
            order = score[~inside].argsort(descending=True)[:5]
            largest = mean.abs()[~inside][order]
            assert bool((largest[:-1] >= largest[1:] * 0.99).all())


def test_rpca_of_low_rank_gradient_uses_its_magnitude() -> None:
    layer = nn.Linear(30, 20)
    x = torch.ones(1, 30)
    masks = build_masks(
        layer,
        {"l": layer},
        {"l": 40},
        score="rpca",
        batches=[x],
        loss_fn=lambda x: (layer(x) * torch.arange(20.0)).sum(),
    )
    # Row i of g = dy^T x has the value i. By size, the mask is row 19 and 10 columns of row 18.
    # The test only requires rows from 10.
    assert masks["l"].nnz == 40
    assert masks["l"].row_nnz.nonzero().min() >= 10


def test_magnitude_uses_the_frozen_weight() -> None:
    model = tiny("gpt2")
    targets = find_targets(model)
    nnz = dict.fromkeys(targets, 50)
    expected = {
        name: (w.T if type(m).__name__ == "Conv1D" else w).detach().abs()
        for name, m in targets.items()
        for w in [m.weight]
    }
    assert_top(build_masks(model, targets, nnz, score="magnitude"), expected, nnz, tolerance=0)


def test_magnitude_excludes_a_resident_sparse_adapter() -> None:
    linear = nn.Linear(12, 10)
    w0 = linear.weight.detach().clone()
    pattern = CsrPattern.from_mask(torch.eye(10, 12))
    layer = RosaLinear.from_linear(linear, rank=2, pattern=pattern)
    with torch.no_grad():
        layer.adapters["default"].values.fill_(100.0)
    handle = rk.nn.make_resident(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    assert layer.weight.abs().max() > 50
    masks = build_masks(layer, {"l": layer}, {"l": 20}, score="magnitude")
    handle.remove()
    assert_top(masks, {"l": w0.abs()}, {"l": 20}, tolerance=0)
    assert base_weight(layer).equal(w0)


def test_magnitude_of_a_half_precision_weight() -> None:
    layer = nn.Linear(50, 40).to(torch.bfloat16)
    masks = build_masks(layer, {"l": layer}, {"l": 100}, score="magnitude")
    assert_top(masks, {"l": layer.weight.detach().float().abs()}, {"l": 100}, tolerance=0)


def test_random_depends_only_on_seed_and_name() -> None:
    model = tiny("llama")
    targets = find_targets(model)
    nnz = dict.fromkeys(targets, 100)
    masks = build_masks(model, targets, nnz, score="random", seed=1)
    torch.manual_seed(99)
    turned = dict(reversed(targets.items()))
    again = build_masks(model, turned, dict(reversed(nnz.items())), score="random", seed=1)
    other = build_masks(model, targets, nnz, score="random", seed=2)
    for name in targets:
        assert dense(masks[name]).equal(dense(again[name]))
        assert not dense(masks[name]).equal(dense(other[name]))
    alike = [name for name in targets if name.endswith("q_proj")]
    assert not dense(masks[alike[0]]).equal(dense(masks[alike[1]]))


def test_random_scores_are_uniform() -> None:
    values = random_scores("layer", (300, 400), seed=0).flatten()
    counts = torch.histc(values, bins=10, min=0, max=1)
    # Each bin expects 12,000 values. The bound is 5 standard deviations of 104.
    assert (counts - 12_000).abs().max() < 520
    correlation = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(values))


def test_grad_mean_is_independent_of_batch_split() -> None:
    model = tiny("llama")
    (whole,) = batches(1, rows=6)
    parts = [
        {key: value[rows] for key, value in whole.items()}
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    (together, apart) = (scored(model, "grad_mean", data, None) for data in ([whole], parts))
    for name, score in together.items():
        torch.testing.assert_close(
            apart[name] / tokens_in(whole), score, rtol=1e-3, atol=float(score.abs().max()) * 1e-5
        )


def test_grad_mean_squared_scale_is_independent_of_split() -> None:
    # Token gradients have mean 0 and variance 1. Then (1 / K) sum_k n_k g_k^2 is 1 on average,
    # for 64 tokens in batches of 64, of 4, or of 1 to 31.
    torch.manual_seed(0)
    layer = nn.Linear(40, 50)
    noise, x = torch.randn(64, 50), torch.randn(64, 40)

    def loss_fn(rows: slice) -> Tensor:
        return (layer(x[rows]) * noise[rows]).sum(dim=1).mean()

    averages = []
    for sizes in ([64], [4] * 16, [1, 31, 2, 14, 8, 8]):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        data = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        found: dict[str, Tensor] = {}
        give_scores(
            "grad_mean_squared",
            layer,
            {"l": layer},
            found.__setitem__,
            data=scores.Data(data, loss_fn, lambda rows: rows.stop - rows.start, lambda t: t),
            seed=0,
            memory_bytes=None,
        )
        averages.append(float(found["l"].mean()) / len(sizes))
    assert averages == pytest.approx([1.0] * 3, rel=0.15)


def test_count_tokens_counts_labels_with_a_loss() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, 3, -100]])
    assert count_tokens({"labels": labels}) == 3  # no token predicts the first label of a row
    assert count_tokens({"input_ids": labels}) == 1
    assert count_tokens(labels) == 1


LEAST = 4 * 56 * 32  # of the largest layer of tiny("llama")


class Counted:
    """The model's loss, which also counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.run, self.passes = loss_of(model), 0

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        self.passes += 1
        return self.run(batch)


@pytest.mark.parametrize(
    ("score", "count", "memory", "passes", "for_each_group"),
    [
        ("grad_mean_squared", 1, LEAST, 1, False),
        ("grad_mean_squared", 3, LEAST, 3, True),
        ("grad_mean_squared", 3, None, 3, False),
        ("grad_mean_squared", 3, 10**9, 3, False),
        ("grad_mean", 2, LEAST, 2, True),
        ("grad_mean", 2, None, 2, False),
        ("rpca", 1, LEAST, 1, False),
        ("grasp", 1, None, 3, True),
        ("grasp", 2, 10**9, 6, False),
    ],
)
def test_number_of_passes_of_each_score(
    score: str, count: int, memory: int | None, passes: int, for_each_group: bool
) -> None:
    model = tiny("llama")
    targets = find_targets(model)
    groups = len(groups_within(target_shapes(targets), None))
    loss_fn = Counted(model)
    build_masks(
        model,
        targets,
        dict.fromkeys(targets, 10),
        score=score,
        batches=batches(count),
        loss_fn=loss_fn,
        memory_bytes=memory,
    )
    assert groups > 4
    assert loss_fn.passes == passes * (groups if for_each_group else 1)


@pytest.mark.parametrize("score", ["grad_mean", "grad_mean_squared", "rpca"])
def test_groups_do_not_change_the_scores(score: str) -> None:
    model, data = tiny("gpt2"), batches(2)
    few, many = (scored(model, score, data, memory) for memory in (10**9, None))
    for name, expected in few.items():
        assert many[name].equal(expected)


def test_groups_within_a_memory_limit() -> None:
    shapes = {"a": (4, 4), "b": (2, 8), "c": (8, 8), "d": (1, 1), "e": (4, 8)}
    assert groups_within(shapes, None) == [["a", "b"], ["c"], ["d", "e"]]
    assert groups_within(shapes, 4 * 96) == [["a", "b", "c"], ["d", "e"]]
    assert groups_within(shapes, 10**6) == [["a", "b", "c", "d", "e"]]
    with pytest.raises(
        ValueError, match=r"at least 256 \(what 'c' of shape \(8, 8\) needs\), got 2"
    ):
        groups_within(shapes, 255)


def test_default_memory_is_a_quarter_of_the_free(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = find_targets(tiny("llama"))
    total = one_pass_memory(target_shapes(targets))
    assert len(groups_within(target_shapes(targets), total)) == 1
    assert len(groups_within(target_shapes(targets), total - 1)) == 2
    for free, expected in ((8 * total, 2 * total), (4 * total, total), (0, LEAST)):
        monkeypatch.setattr(spare_memory, "_free", lambda _, free=free: free)
        assert default_memory("grad_mean", targets) == expected
        assert default_memory("grad_mean", targets, processes=2) == max(expected // 2, LEAST)
        # GraSP's scores depend on the groups.
        assert default_memory("grasp", targets) == LEAST


def test_free_memory_is_within_the_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(spare_memory, "_MEMINFO", tmp_path / "meminfo")
    cpu = torch.device("cpu")
    assert spare_memory.spare_memory([cpu]) == 0  # unknown
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert spare_memory.spare_memory([cpu, cpu]) == 4000 * 1024 // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert spare_memory.spare_memory([cpu]) == 4000 * 1024 // 4
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert spare_memory.spare_memory([cpu]) == 400 // 4
    (tmp_path / "memory.current").write_text("2000\n")
    assert spare_memory.spare_memory([cpu]) == 0


def test_every_score_makes_different_masks() -> None:
    model = tiny("llama")
    targets = find_targets(model)
    nnz = {name: 20 + i for i, name in enumerate(targets)}
    data = batches(1)
    found = {
        score: build_masks(model, targets, nnz, score=score, batches=data, loss_fn=loss_of(model))
        for score in SCORES
    }
    for masks in found.values():
        assert {name: mask.nnz for name, mask in masks.items()} == nnz
    masks = [torch.cat([dense(m).flatten() for m in masks.values()]) for masks in found.values()]
    for i, mask in enumerate(masks):
        differing = [int((mask != other).sum()) for other in masks[:i]]
        # With one batch, grad_mean and grad_mean_squared give the same ranking.
        assert all(differing) or differing == [0]
    assert_top(found["grad_mean"], dense_scores(model, data, "grad_mean"), nnz)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("memory_bytes", [LEAST, 10**9])
def test_forwards_predicts_the_number_of_passes(
    score: str, count: int, memory_bytes: int | None
) -> None:
    model, data = tiny("llama"), batches(count)
    calls = 0

    def counted(batch: object) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model)(batch)

    targets = find_targets(model)
    build_masks(
        model,
        targets,
        dict.fromkeys(targets, 5),
        score=score,
        batches=data,
        loss_fn=counted,
        memory_bytes=memory_bytes,
    )
    assert calls == forwards(score, target_shapes(targets), count, memory_bytes)
