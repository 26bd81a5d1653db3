"""`build_masks`: number and place of nonzeros, refusals, and equal masks on every rank."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_models import Batch, Stack, batches, dense, dense_scores, inputs, loss_of, tiny
from torch import Tensor, nn

from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.mask_files import load_masks, save_masks
from rosa_kernels.masks.targets import find_targets, target_shapes

# -- nonzeros --------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["grad_mean", "grad_mean_squared"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_global_scope_shares_one_threshold(family: str, count: int, score: str) -> None:
    model, data = tiny(family), batches(count)
    expected = dense_scores(model, data, score)
    nnz = {name: 10 + i for i, name in enumerate(expected)}
    masks = build_masks(
        model,
        find_targets(model),
        nnz,
        score=score,
        batches=data,
        loss_fn=loss_of(model),
        scope="global",
    )
    assert list(masks) == list(nnz)
    assert sum(mask.nnz for mask in masks.values()) == sum(nnz.values())
    assert {name: mask.nnz for name, mask in masks.items()} != nnz
    chosen = torch.cat([expected[name][dense(mask)] for name, mask in masks.items()])
    others = torch.cat([expected[name][~dense(mask)] for name, mask in masks.items()])
    assert chosen.min() >= others.max() * (1 - 1e-4)


def test_global_scope_may_leave_a_module_empty() -> None:
    model = Stack(8, 8, 8)
    model.layers[0].weight.data.mul_(1e-3)
    masks = build_masks(
        model, model.targets(), {"layers.0": 20, "layers.1": 3}, score="magnitude", scope="global"
    )
    assert [mask.nnz for mask in masks.values()] == [0, 23]


def test_ties_go_to_the_first_entries() -> None:
    # The gradient is 0 except in row 2.
    layer = nn.Linear(4, 3)
    options = {"batches": [torch.ones(2, 4)], "loss_fn": lambda x: layer(x)[:, 2].sum()}
    masks = build_masks(layer, {"l": layer}, {"l": 7}, **options)
    expected = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert dense(masks["l"]).equal(expected)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_empty_and_full_masks(scope: str) -> None:
    model = Stack(6, 5, 4)
    options = {"batches": inputs(1, 6), "loss_fn": model, "scope": scope}
    masks = build_masks(model, model.targets(), {"layers.0": 30, "layers.1": 20}, **options)
    assert all(dense(mask).all() for mask in masks.values())
    masks = build_masks(model, model.targets(), {"layers.0": 0, "layers.1": 0}, **options)
    assert [mask.nnz for mask in masks.values()] == [0, 0]
    assert [mask.shape for mask in masks.values()] == [(5, 6), (4, 5)]


def test_layer_with_nnz_0_needs_no_gradient() -> None:
    model = Stack(6, 5, 4)
    idle = nn.Linear(3, 3)
    masks = build_masks(
        model,
        {**model.targets(), "idle": idle},
        {"layers.0": 5, "layers.1": 5, "idle": 0},
        batches=inputs(1, 6),
        loss_fn=model,
    )
    assert masks["idle"].nnz == 0


def test_batches_may_be_a_generator() -> None:
    model = Stack(6, 5, 4)
    nnz = {"layers.0": 5, "layers.1": 5}
    data = inputs(3, 6)
    found = [
        build_masks(model, model.targets(), nnz, batches=source, loss_fn=model)
        for source in (data, (x for x in data))
    ]
    for name in nnz:
        assert dense(found[0][name]).equal(dense(found[1][name]))


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": "fisher"}, ValueError, "a score of grad_mean, grad_mean_squared, random, magni"),
        ({"scope": "model"}, ValueError, "scope 'layer' or 'global', got 'model'"),
        ({"targets": {}, "nnz": {}}, ValueError, "at least one target, got none"),
        ({"nnz": {"layers.0": 1}}, ValueError, "none for ['layers.1'] and some for the unknown []"),
        (
            {"nnz": {"layers.0": 1, "layers.1": 1, "head": 1}},
            ValueError,
            "none for [] and some for the unknown ['head']",
        ),
        (
            {"nnz": {"layers.0": 31, "layers.1": 1}},
            ValueError,
            "[0, 30] for 'layers.0' of shape (5",
        ),
        (
            {"nnz": {"layers.0": 1, "layers.1": -1}},
            ValueError,
            "[0, 20] for 'layers.1' of shape (4",
        ),
        ({"batches": None}, ValueError, "at least one batch for grad_mean_squared, got 0 batches"),
        ({"batches": []}, ValueError, "at least one batch for grad_mean_squared, got 0 batches"),
        ({"loss_fn": None}, ValueError, "got 1 batches and no loss_fn"),
        ({"loss_fn": lambda x: x}, TypeError, "a scalar tensor, got shape (7, 6)"),
        ({"loss_fn": lambda x: 1.0}, TypeError, "a scalar tensor, got float"),
        (
            {"loss_fn": lambda x: x.sum() * math.nan},
            ValueError,
            "a finite loss, got nan for batch 0",
        ),
        ({"batches": [None] * 2, "memory_bytes": 119}, ValueError, "memory_bytes of at least 120"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    model = Stack(6, 5, 4)
    arguments = {
        "targets": model.targets(),
        "nnz": {"layers.0": 5, "layers.1": 5},
        "batches": inputs(1, 6),
        "loss_fn": model,
        **changes,
    }
    with pytest.raises(error, match=re.escape(message)):
        build_masks(model, **arguments)


def test_target_that_is_not_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="got 'embedding' of class Embedding"):
        build_masks(nn.Embedding(4, 4), {"embedding": nn.Embedding(4, 4)}, {"embedding": 1})


def test_module_under_two_names_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="each module once, got one under 'a' and 'b'"):
        build_masks(layer, {"a": layer, "b": layer}, {"a": 1, "b": 1}, score="random")


@pytest.mark.parametrize("score", ["grad_mean", "grad_mean_squared", "rpca", "grasp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_overflowing_gradients_name_their_module(score: str, scope: str) -> None:
    model = Stack(6, 5, 4)

    def loss_fn(x: Tensor) -> Tensor:
        y = model.layers[0](x)
        y.register_hook(lambda dy: dy * math.inf)
        return model.layers[1](y).square().mean()

    with pytest.raises(ValueError, match=r"expected finite (scores|gradients) .*'layers\.0'"):
        build_masks(
            model,
            model.targets(),
            {"layers.0": 5, "layers.1": 5},
            score=score,
            scope=scope,
            batches=inputs(1, 6),
            loss_fn=loss_fn,
        )


def test_magnitude_of_a_nan_weight_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data[2, 1] = math.nan
    with pytest.raises(ValueError, match="expected finite scores of 'l', got NaN"):
        build_masks(layer, {"l": layer}, {"l": 3}, score="magnitude")


# -- ranks ---------------------------------------------------------------------------------------

RANK = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_build import build_on_rank

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
build_on_rank(rank, folder)
dist.destroy_process_group()
"""
RANK_RUNS = [
    (score, scope) for score in ("grad_mean", "grad_mean_squared") for scope in ("layer", "global")
] + [("grasp", "layer")]
RANK_NNZ = {"layers.0": 40, "layers.1": 30, "layers.2": 20}


def rank_batches() -> list[Batch]:
    """A batch for each rank. The batches differ in their important inputs and their length."""
    data = [{"x": x, "labels": torch.zeros(1, 3 + 4 * i)} for i, x in enumerate(inputs(2, 20))]
    data[1]["x"][:, :10] = 0
    return data


def build_on_rank(rank: int, folder: Path) -> None:
    """Builds and saves masks from this rank's batch for every run; called in the rank's process."""
    import torch.distributed as dist

    model = Stack(20, 16, 12, 8)

    def reduce(tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= 2

    for i, (score, scope) in enumerate(RANK_RUNS):
        masks = build_masks(
            model,
            model.targets(),
            RANK_NNZ,
            score=score,
            scope=scope,
            batches=[rank_batches()[rank]],
            loss_fn=lambda batch: model(batch["x"]),
            reduce=reduce,
            broadcast=lambda tensor: dist.broadcast(tensor, src=0),
        )
        save_masks(masks, folder / f"{i}-{rank}.safetensors")
    # Without `reduce`, each rank would get masks of its own. `broadcast` sends those of rank 0.
    masks = build_masks(
        model,
        model.targets(),
        RANK_NNZ,
        scope="global",
        batches=[rank_batches()[rank]],
        loss_fn=lambda batch: model(batch["x"]),
        broadcast=lambda tensor: dist.broadcast(tensor, src=0),
    )
    save_masks(masks, folder / f"sent-{rank}.safetensors")


def test_every_rank_builds_the_same_masks(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    code = RANK.format(tests=str(here))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=here.parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    model = Stack(20, 16, 12, 8)

    def alone(data: list[Batch], **options: str) -> dict[str, Tensor]:
        masks = build_masks(
            model,
            model.targets(),
            RANK_NNZ,
            batches=data,
            loss_fn=lambda batch: model(batch["x"]),
            memory_bytes=10**6,
            **options,
        )
        return {name: dense(mask) for name, mask in masks.items()}

    def read(name: str) -> dict[str, Tensor]:
        masks = load_masks(tmp_path / f"{name}.safetensors", target_shapes(model.targets()))
        return {name: dense(mask) for name, mask in masks.items()}

    for i, (score, scope) in enumerate(RANK_RUNS):
        first, second = read(f"{i}-0"), read(f"{i}-1")
        if score == "grasp":  # `alone` forms larger groups of layers, which change the scores
            expected = first
        else:
            expected = alone(rank_batches(), score=score, scope=scope)
            own = alone(rank_batches()[:1], score=score, scope=scope)
            assert any(not own[name].equal(expected[name]) for name in own)
        for name in RANK_NNZ:
            assert first[name].equal(second[name]), (score, scope, name)
            assert first[name].equal(expected[name]), (score, scope, name)
    first, second = read("sent-0"), read("sent-1")
    for name, mask in alone(rank_batches()[:1], scope="global").items():
        assert first[name].equal(mask)
        assert second[name].equal(mask)
