"""CsrPattern.save and load: safetensors files, validated patterns, and no pickles."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import sweep
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.testing import NASTY

METADATA = {"format": "rosa_kernels.CsrPattern", "version": "1"}


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    """The tensors of a valid file: shape (2, 3), nonzeros at (0, 1), (1, 0) and (1, 2)."""
    return {
        "crow_indices": torch.tensor([0, 1, 3], dtype=torch.int32),
        "col_indices": torch.tensor([1, 0, 2], dtype=torch.int32),
        "shape": torch.tensor([2, 3]),
        **changes,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pattern.safetensors"


@sweep(nasty=NASTY)
def test_saved_patterns_are_loaded_unchanged(nasty: CsrPattern, path: Path) -> None:
    nasty.save(path)
    for where in (path, str(path)):
        loaded = CsrPattern.load(where)
        assert loaded.shape == nasty.shape
        assert torch.equal(loaded.crow_indices, nasty.crow_indices)
        assert torch.equal(loaded.col_indices, nasty.col_indices)


def test_a_file_has_three_named_tensors(pattern: CsrPattern, path: Path) -> None:
    """Other programs may read the file by these names and dtypes."""
    pattern.save(path)
    file = load_file(path)
    assert {name: t.dtype for name, t in file.items()} == {
        "crow_indices": torch.int32,
        "col_indices": torch.int32,
        "shape": torch.int64,
    }
    assert file["shape"].tolist() == [37, 53]


def test_a_transpose_can_be_saved(pattern: CsrPattern, path: Path) -> None:
    pattern.T.save(path)
    assert torch.equal(CsrPattern.load(path).T.col_indices, pattern.col_indices)


def test_index_tensors_that_share_memory_can_be_saved(path: Path) -> None:
    both = torch.zeros(3, dtype=torch.int32)
    CsrPattern(both, both[:0], (2, 1)).save(path)
    assert CsrPattern.load(path).nnz == 0


def test_a_changed_pattern_is_not_saved(pattern: CsrPattern, path: Path) -> None:
    pattern.col_indices.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        pattern.save(path)
    assert not path.exists()


def test_a_missing_file_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CsrPattern.load(path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 60, -41, -1])
def test_truncated_files_are_refused(pattern: CsrPattern, path: Path, kept: int) -> None:
    pattern.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*pattern.safetensors"):
        CsrPattern.load(path)


@pytest.mark.parametrize("content", [b"\xff" * 200, b"PK\x03\x04" + bytes(100), b"{}" * 50])
def test_other_kinds_of_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        CsrPattern.load(path)


class Bomb:
    exploded = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_pickles_are_not_opened(path: Path, save: str) -> None:
    if save == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"crow_indices": Bomb()}, path)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        CsrPattern.load(path)
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        ({"weight": torch.ones(2, 2)}, None),
        ({}, METADATA),
        ({k: v for k, v in tensors().items() if k != "shape"}, METADATA),
        (tensors(values=torch.ones(3)), METADATA),
        (tensors(), None),
        (tensors(), {**METADATA, "version": "2"}),
    ],
    ids=["foreign", "empty", "a tensor less", "a tensor more", "no version", "newer version"],
)
def test_other_safetensors_files_are_refused(
    path: Path, content: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    save_file(content, path, metadata=metadata)
    message = (
        r"expected tensors \['col_indices', 'crow_indices', 'shape'\] in format version 1, got"
    )
    with pytest.raises(ValueError, match=message):
        CsrPattern.load(path)


BAD = {
    "column out of range": (
        tensors(col_indices=torch.tensor([1, 0, 3])),
        "expected col_indices in [0, 3), got values from 0 to 3",
    ),
    "negative column": (
        tensors(col_indices=torch.tensor([1, -9, 2])),
        "expected col_indices in [0, 3), got values from -9 to 2",
    ),
    "unsorted columns": (tensors(col_indices=torch.tensor([1, 2, 0])), "got unsorted columns 2, 0"),
    "repeated columns": (tensors(col_indices=torch.tensor([1, 2, 2])), "got repeated columns 2, 2"),
    "rows past nnz": (tensors(crow_indices=torch.tensor([0, 1, 4])), "run from 0 to nnz = 3"),
    "falling rows": (tensors(crow_indices=torch.tensor([0, 4, 3])), "got 4 then 3 at row 1"),
    "rows that wrap": (
        tensors(
            crow_indices=torch.tensor([0, 2**31 - 1, -2, 3], dtype=torch.int32),
            shape=torch.tensor([3, 3]),
        ),
        "got 2147483647 then -2 at row 1",
    ),
    "too few rows": (tensors(crow_indices=torch.tensor([0, 3])), "length m + 1 = 3, got 2"),
    "float columns": (tensors(col_indices=torch.tensor([1.0, 0.0, 2.0])), "got torch.float32"),
    "2-D rows": (tensors(crow_indices=torch.tensor([[0, 1, 3]])), "to be 1-D, got shape (1, 3)"),
    "huge shape": (tensors(shape=torch.tensor([2, 2**40])), "dimensions below 2**31"),
    "negative shape": (tensors(shape=torch.tensor([2, -3])), "sizes >= 0, got (2, -3)"),
    "float shape": (tensors(shape=torch.tensor([2.0, 3.0])), "expected shape as 2 int64 numbers"),
    "long shape": (tensors(shape=torch.tensor([2, 3, 4])), "expected shape as 2 int64 numbers"),
}


@pytest.mark.parametrize("bad", BAD)
def test_invalid_indices_and_shapes_are_refused(path: Path, bad: str) -> None:
    """Each case raises a ValueError that names the file. No pattern is built from it."""
    content, message = BAD[bad]
    save_file(content, path, metadata=METADATA)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        CsrPattern.load(path)
    assert str(path) in str(raised.value)
