"""Rows of a data set: their counts, their division among processes, and their names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rosa_train.data.collate import IGNORED
from rosa_train.data.dataset import Dataset, split_of
from rosa_train.data.examples import Example

from .train_runs import arguments


def example(prompt: int, completion: int, at: int = 0) -> Example:
    return Example([1] * prompt, [2] * completion, "", f"x.jsonl:{at}")


EXAMPLES = [example(p, c, p) for p, c in [(3, 2), (9, 1), (1, 1), (5, 5), (2, 2), (7, 4), (4, 1)]]


@pytest.mark.parametrize("pack_to", [None, 16])
def test_row_counts_match_the_batches(pack_to: int | None) -> None:
    rows = Dataset(EXAMPLES, 0, pack_to)
    assert sum(rows.targets) == sum(e.targets for e in EXAMPLES)
    assert sum(rows.lengths) == sum(len(e) for e in EXAMPLES)
    for i in range(len(rows)):
        batch = rows.collate([i])
        assert int((batch["labels"] != IGNORED).sum()) == rows.targets[i]
        assert batch["input_ids"].shape[1] == rows.lengths[i]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_shares_cover_all_rows_once(world: int, size: int) -> None:
    rows = Dataset(EXAMPLES, 0)
    shares = [rows.share(range(7), size, rank, world) for rank in range(world)]
    assert sorted(i for rank in shares for share in rank for i in share) == list(range(7))
    assert all(len(share) <= size for rank in shares for share in rank)
    tokens = [sum(rows.lengths[i] for share in rank for i in share) for rank in shares]
    assert max(tokens) - min(tokens) <= max(rows.lengths)


def test_share_of_a_process_may_be_empty() -> None:
    assert Dataset(EXAMPLES, 0).share([3], 4, rank=1, world=2) == []


def test_shares_group_rows_of_equal_length() -> None:
    rows = Dataset([example(1 + i % 3, 1) for i in range(12)], 0)
    for share in rows.share(range(12), 4, 0, 1):
        assert len({rows.lengths[i] for i in share}) == 1


def test_where_names_the_records() -> None:
    assert Dataset(EXAMPLES, 0).where([2, 0]) == "x.jsonl:1, x.jsonl:3"
    assert "x.jsonl:9" in Dataset(EXAMPLES, 0, 64).where([0])


def test_digest_depends_only_on_the_tokens() -> None:
    digest = Dataset(EXAMPLES, 0).digest()
    assert Dataset(EXAMPLES, 0, 16).digest() == digest
    assert Dataset(EXAMPLES[:-1], 0).digest() != digest
    assert Dataset([*EXAMPLES[:-1], example(1, 4)], 0).digest() != digest


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("viggo", ("viggo", None)),
        ("gsm8k:main", ("gsm8k:main", None)),
        ("gsm8k:main[test]", ("gsm8k:main", "test")),
        ("viggo[train[:100]]", ("viggo", "train[:100]")),
    ],
)
def test_split_is_given_in_brackets(name: str, parts: tuple[str, str | None]) -> None:
    assert split_of(name) == parts


def test_dataset_name_and_split_reach_read_records(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def read(source: str, **options: Any) -> list[Any]:
        asked.update(options, source=source)
        return []

    monkeypatch.setattr("rosa_train.data.dataset.read_records", read)
    monkeypatch.setattr("rosa_train.data.dataset.encode", lambda *_, **__: EXAMPLES)
    monkeypatch.setattr("rosa_train.data.dataset.pad_token_id", lambda _: 0)
    from rosa_train.data.dataset import read_dataset

    changes = {"train_file": None, "dataset_name": "gsm8k:main[test]", "max_train_examples": 5}
    _, data, _, _ = arguments(Path("m"), Path("o"), **changes)
    read_dataset(data, SimpleNamespace(eos_token_id=1), training=True)
    assert asked == {"source": "gsm8k:main", "split": "test", "limit": 5}
