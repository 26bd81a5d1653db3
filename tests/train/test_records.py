"""Reading data sets: accepted files, and error messages that name the faulty line."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_train.data.records import read_records


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_keep_every_value_and_its_line(tmp_path: Path) -> None:
    text = '\ufeff{"a": "x\\u2028y", "n": 1}\r\n\r\n  \n{"a": "\u2028 \x85"}\n{"a": [1, null]}'
    path = write(tmp_path, "train.jsonl", text)
    records = read_records(path)
    assert [record.fields for record in records] == [
        {"a": "x\u2028y", "n": 1},
        {"a": "\u2028 \x85"},
        {"a": [1, None]},
    ]
    assert [record.where for record in records] == [f"{path}:{n}" for n in (1, 4, 5)]


def test_json_may_hold_lines_or_one_array(tmp_path: Path) -> None:
    lines = read_records(write(tmp_path, "lines.json", '{"a": 1}\n{"a": 2}\n'))
    array = read_records(write(tmp_path, "array.json", '\n[\n {"a": 1},\n {"a": 2}\n]\n'))
    assert [r.fields for r in lines] == [r.fields for r in array] == [{"a": 1}, {"a": 2}]
    assert array[1].where.endswith("array.json[1]")


def test_csv_records_know_their_line_numbers(tmp_path: Path) -> None:
    text = '\ufeffref,mr\r\n"one,\r\ntwo ""x""",a\r\n\r\nplain,b\r\n'
    path = write(tmp_path, "train.csv", text)
    records = read_records(str(path))
    assert [record.fields for record in records] == [
        {"ref": 'one,\r\ntwo "x"', "mr": "a"},
        {"ref": "plain", "mr": "b"},
    ]
    assert [record.where for record in records] == [f"{path}:2", f"{path}:5"]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(rows=st.lists(st.fixed_dictionaries({"a": words, "b": words}), min_size=1, max_size=5))
def test_json_lines_and_csv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["a", "b"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    for path in (write(folder, "x.jsonl", lines), write(folder, "x.csv", table.getvalue())):
        assert [dict(record.fields) for record in read_records(path)] == rows


def test_limit_stops_reading_early(tmp_path: Path) -> None:
    path = write(tmp_path, "train.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    assert [record.fields["a"] for record in read_records(path, limit=2)] == [1, 2]
    with pytest.raises(ValueError, match=r"limit >= 1, got 0"):
        read_records(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 1,}\n', r"x\.jsonl:3: expected JSON, got .* at column 9"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', r"x\.jsonl:2: expected JSON, got Expecting ':' delimiter"),
        ("x.jsonl", '{"a": 1}{"a": 2}\n', r"x\.jsonl:1: expected JSON, got Extra data"),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl:1: expected JSON, got .*recursion"),
        ("x.jsonl", '{"a": ' + "9" * 9999 + "}", r"x\.jsonl:1: expected JSON, got .*digits"),
        ("x.jsonl", '[{"a": 1}]', r"x\.jsonl:1: expected an object, got an array"),
        ("x.jsonl", '{"a": 1}\n"a"', r"x\.jsonl:2: expected an object, got a string"),
        ("x.jsonl", "true", r"x\.jsonl:1: expected an object, got a boolean"),
        ("x.jsonl", "null", r"x\.jsonl:1: expected an object, got null"),
        ("x.jsonl", "1.5", r"x\.jsonl:1: expected an object, got a number"),
        ("x.json", '[{"a": 1},\n{"a": }]', r"x\.json:2: expected JSON, got Expecting value"),
        ("x.json", '[{"a": 1}, 2]', r"x\.json\[1\]: expected an object, got a number"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe4"}', r"x\.jsonl:2: expected UTF-8, got byte 0xe4 at"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), r"x\.csv:1: expected UTF-8, .*; UTF-16\?"),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv:3: expected 2 fields \(a, b\), got 1"),
        ("x.csv", 'a,b\n"1\n1",2\n3,4,5\n', r"x\.csv:4: expected 2 fields \(a, b\), got 3"),
        ("x.csv", 'a,b\n1,2\n"3,4\n', r"x\.csv:3: expected CSV, got unexpected end of data"),
        ("x.csv", 'a,b\n"1"x,2\n', r"x\.csv:2: expected CSV, got .*expected after"),
        ("x.csv", "a,a\n1,2\n", r"x\.csv:1: expected a header of distinct names, got 'a', 'a'"),
        ("x.csv", "a,\n1,2\n", r"x\.csv:1: expected a header of distinct names, got 'a', ''"),
        ("x.csv", "a,b\n", r"expected at least one record, got none in .*x\.csv"),
        ("x.jsonl", "", r"expected at least one record, got none in .*x\.jsonl"),
        ("x.jsonl", "\ufeff\n \n", r"expected at least one record, got none"),
        ("x.json", "[]", r"expected at least one record, got none"),
        ("x.parquet", "PAR1", r"expected a \.jsonl, \.json or \.csv file, got a \.parquet: .*x\."),
        ("README", "x", r"expected a \.jsonl, \.json or \.csv file, got a file without suffix: "),
    ],
)
def test_unreadable_files_are_refused_with_their_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path, name, content))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.csv", "train.txt"):
        with pytest.raises(FileNotFoundError, match=r"expected a \.jsonl, \.json or \.csv file"):
            read_records(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a .* file, got a folder"):
        read_records(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"expected a .* file, got a folder"):
        read_records(tmp_path / "folder.csv")


def test_split_of_a_local_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"a": 1}')
    with pytest.raises(ValueError, match=r"no split with a local file, got split 'train'"):
        read_records(path, split="train")


class FakeDatasets(ModuleType):
    """Replaces the package `datasets` for read_records, without a network."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        super().__init__("datasets")
        self.rows, self.asked = rows, []  # type: ignore[var-annotated]

    def load_dataset(self, name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        self.asked.append((name, config, split))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_dataset_name_is_loaded_with_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([{"a": 1}, {"a": 2}, {"a": 3}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    first, second = read_records("owner/some-name:main", limit=2)
    assert (first.fields, second.where) == ({"a": 1}, "owner/some-name:main[train]:1")
    assert len(read_records("name", split="test[:3]")) == 3
    assert fake.asked == [("owner/some-name", "main", "train"), ("name", None, "test[:3]")]
    fake.rows = []
    with pytest.raises(ValueError, match=r"expected at least one record, got none in name"):
        read_records("name")


def test_dataset_name_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(ConnectionError("no route")))
    with pytest.raises(ValueError, match=r"got 'no/such'.*its split 'train'.*Conn.*no route"):
        read_records("no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'rosa-kernels\[train\]'"):
        read_records("no/such")


def test_a_local_file_never_imports_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_records(write(tmp_path, "x.jsonl", '{"a": 1}'))) == 1
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "absent.jsonl")
