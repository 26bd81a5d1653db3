"""Mask files: a round trip, and the refusal of damaged files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from mask_models import Stack
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.mask_files import load_masks, save_masks


def some_masks() -> dict[str, CsrPattern]:
    model = Stack(6, 5, 4)
    nnz = {"layers.0": 9, "layers.1": 0}
    return build_masks(model, model.targets(), nnz, score="random")


def test_saved_masks_load_unchanged(tmp_path: Path) -> None:
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


def test_mask_file_is_compact(tmp_path: Path) -> None:
    pattern = CsrPattern.from_mask(torch.rand(200, 300) < 0.1)
    path = tmp_path / "masks.safetensors"
    save_masks({"a.b": pattern, "again": pattern}, path)  # the same tensors under two names
    tensors = load_file(path)
    assert sorted(tensors) == [
        f"{name}.{part}" for name in ("a.b", "again") for part in ("col_indices", "crow_indices")
    ]
    assert {t.dtype for t in tensors.values()} == {torch.int32}
    assert path.stat().st_size < 2 * 4 * (pattern.nnz + 201) + 1000


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(some_masks(), path)
    before = path.read_bytes()
    changed = some_masks()
    changed["layers.0"].col_indices.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        save_masks(changed, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
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
def test_files_with_wrong_indices_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
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
def test_files_with_wrong_metadata_are_refused(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_masks(a_file(tmp_path / "masks.safetensors", metadata))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
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
