"""Masks as a whole: how many, where, the same on every rank and device, and in files."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_models import Batch, batches, dense, dense_scores, loss_of, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.mask_files import load_masks, save_masks
from rosa_kernels.masks.targets import find_targets, target_shapes


class Stack(nn.Module):
    """Linear layers of several shapes, one after the other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))

    def targets(self) -> dict[str, nn.Module]:
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def inputs(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(7, size, generator=generator) for _ in range(count)]


# -- how many, and where -------------------------------------------------------------------------


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


def test_ties_go_to_the_first() -> None:
    # Gradients of 0 everywhere but in row 2.
    layer = nn.Linear(4, 3)
    options = {"batches": [torch.ones(2, 4)], "loss_fn": lambda x: layer(x)[:, 2].sum()}
    masks = build_masks(layer, {"l": layer}, {"l": 7}, **options)
    expected = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert dense(masks["l"]).equal(expected)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_none_and_all(scope: str) -> None:
    model = Stack(6, 5, 4)
    options = {"batches": inputs(1, 6), "loss_fn": model, "scope": scope}
    masks = build_masks(model, model.targets(), {"layers.0": 30, "layers.1": 20}, **options)
    assert all(dense(mask).all() for mask in masks.values())
    masks = build_masks(model, model.targets(), {"layers.0": 0, "layers.1": 0}, **options)
    assert [mask.nnz for mask in masks.values()] == [0, 0]
    assert [mask.shape for mask in masks.values()] == [(5, 6), (4, 5)]


def test_a_layer_without_entries_is_not_watched() -> None:
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
def test_refusals(changes: dict[str, object], error: type[Exception], message: str) -> None:
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


def test_a_target_that_is_no_linear_layer() -> None:
    with pytest.raises(TypeError, match="got 'embedding' of class Embedding"):
        build_masks(nn.Embedding(4, 4), {"embedding": nn.Embedding(4, 4)}, {"embedding": 1})


def test_a_module_under_two_names() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="each module once, got one under 'a' and 'b'"):
        build_masks(layer, {"a": layer, "b": layer}, {"a": 1, "b": 1}, score="random")


@pytest.mark.parametrize("score", ["grad_mean", "grad_mean_squared", "rpca", "grasp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradients_that_overflow_name_their_module(score: str, scope: str) -> None:
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


def test_a_weight_that_is_not_finite_has_no_magnitude() -> None:
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
from test_train_masks import Stack, built_on_rank

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
built_on_rank(rank, folder)
dist.destroy_process_group()
"""
RANK_RUNS = [
    (score, scope) for score in ("grad_mean", "grad_mean_squared") for scope in ("layer", "global")
] + [("grasp", "layer")]
RANK_NNZ = {"layers.0": 40, "layers.1": 30, "layers.2": 20}


def rank_batches() -> list[Batch]:
    """One for each rank, which disagree on what is important, and on how long they are."""
    data = [{"x": x, "labels": torch.zeros(1, 3 + 4 * i)} for i, x in enumerate(inputs(2, 20))]
    data[1]["x"][:, :10] = 0
    return data


def built_on_rank(rank: int, folder: Path) -> None:
    """In a process of its own: masks from this rank's batch, for every run."""
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
    # Not reduced: each rank has masks of its own, until rank 0's are sent.
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


def test_the_same_masks_on_every_rank(tmp_path: Path) -> None:
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
        if score == "grasp":  # by default of one layer at a time
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


# -- files ---------------------------------------------------------------------------------------


def some_masks() -> dict[str, CsrPattern]:
    model = Stack(6, 5, 4)
    nnz = {"layers.0": 9, "layers.1": 0}
    return build_masks(model, model.targets(), nnz, score="random")


def test_round_trip(tmp_path: Path) -> None:
    masks, path = some_masks(), tmp_path / "masks.safetensors"
    save_masks(masks, path)
    for shapes in (None, {"layers.0": (5, 6), "layers.1": (4, 5)}):
        loaded = load_masks(str(path), shapes)
        assert list(loaded) == list(masks)
        for name, mask in masks.items():
            assert loaded[name].shape == mask.shape
            assert loaded[name].crow_indices.equal(mask.crow_indices)
            assert loaded[name].col_indices.equal(mask.col_indices)
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_the_format_is_compact(tmp_path: Path) -> None:
    pattern = CsrPattern.from_mask(torch.rand(200, 300) < 0.1)
    path = tmp_path / "masks.safetensors"
    save_masks({"a.b": pattern, "again": pattern}, path)  # tensors that share memory
    tensors = load_file(path)
    assert sorted(tensors) == [
        f"{name}.{part}" for name in ("a.b", "again") for part in ("col_indices", "crow_indices")
    ]
    assert {t.dtype for t in tensors.values()} == {torch.int32}
    assert path.stat().st_size < 2 * 4 * (pattern.nnz + 201) + 1000


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(some_masks(), path)
    before = path.read_bytes()
    changed = some_masks()
    changed["layers.0"].col_indices.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        save_masks(changed, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(some_masks(), path)
    with pytest.raises(ValueError, match="expected masks of this model") as caught:
        load_masks(path, {"layers.0": (5, 6), "layers.1": (8, 5), "head": (3, 3)})
    lines = [line.split("  ") for line in str(caught.value).splitlines()[1:]]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["module", "mask", "model"],
        ["layers.1", "(4, 5)", "(8, 5)"],
        ["head", "absent", "(3, 3)"],
    ]


METADATA = {"format": "rosa_train.masks", "version": "1", "shapes": '{"l": [2, 3]}'}


def a_file(path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor) -> Path:
    right = {
        "l.crow_indices": torch.tensor([0, 1, 3], dtype=torch.int32),
        "l.col_indices": torch.tensor([1, 0, 2], dtype=torch.int32),
    }
    right.update({f"l.{name}": value for name, value in tensors.items()})
    save_file(right, path, {**METADATA, **(metadata or {})})
    return path


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"col_indices": int32(1, 0, 3)}, "col_indices in [0, 3), got values from 0 to 3, for 'l'"),
        ({"col_indices": int32(-1, 0, 2)}, "col_indices in [0, 3), got values from -1 to 2"),
        ({"col_indices": int32(1, 2, 0)}, "got unsorted columns 2, 0 in row 1"),
        ({"col_indices": int32(1, 2, 2)}, "got repeated columns 2, 2 in row 1"),
        ({"crow_indices": int32(0, 4, 3)}, "non-decreasing crow_indices"),
        ({"crow_indices": int32(0, 1, 2, 3)}, "crow_indices of length m + 1 = 3"),
        ({"col_indices": torch.tensor([1, 0, 2])}, "col_indices of int32, got torch.int64"),
        ({"values": torch.ones(3)}, "['l.values'] unexpected"),
    ],
)
def test_files_with_wrong_indices(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_masks(a_file(tmp_path / "masks.safetensors", **tensors))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "version 1, got rosa_train.masks, version 2"),
        ({"format": "other"}, "format rosa_train.masks, version 1, got other"),
        ({"shapes": "{"}, "a shape (m, n) of each module, got"),
        ({"shapes": '{"l": [2]}'}, "a shape (m, n) of each module, got"),
        ({"shapes": '{"l": [2, 3.5]}'}, "a shape (m, n) of each module, got"),
        ({"shapes": '{"l": 7}'}, "a shape (m, n) of each module, got"),
        ({"shapes": "[1]"}, "a shape (m, n) of each module, got"),
        ({"shapes": '{"l": [2, -3]}'}, "a shape (m, n) of sizes >= 0"),
        ({"shapes": '{"l": [2, 3], "k": [1, 1]}'}, "['k.col_indices', 'k.crow_indices'] missing"),
    ],
)
def test_files_with_wrong_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_masks(a_file(tmp_path / "masks.safetensors", metadata))


def test_files_cut_short_anywhere(tmp_path: Path) -> None:
    whole = a_file(tmp_path / "masks.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 7, 8, 40, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected a safetensors file, got "):
            load_masks(cut)
    other = tmp_path / "masks.json"
    other.write_text(json.dumps({"l": [1, 2]}))
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_masks(other)
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "absent.safetensors")
