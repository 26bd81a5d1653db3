"""Strict JSON and JSON lines: what is written, and how it is read back."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_train.files import json_lines, json_text, read_json_lines, write_json

ROOT = Path(__file__).resolve().parents[2]


@given(texts=st.lists(st.text(), max_size=4))
def test_json_lines_read_back_by_any_reader(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    rows = [{"text": text} for text in texts]
    path.write_text(json_lines(rows), encoding="utf-8")
    assert read_json_lines(path) == rows
    # str.splitlines finds the same lines.
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows


def test_letters_stay_readable_and_separators_are_escaped() -> None:
    text = json_text({"a": "é 水 \u2028\u2029\x85\ud800 \U0001f600"})
    assert text == '{"a": "é 水 \\u2028\\u2029\\u0085\\ud800 \U0001f600"}'


def test_lines_of_others_end_only_at_newlines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\u2028\x85"}\n{"a": 1}\n{"a', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "\u2028\x85"}, {"a": 1}]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    for number in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_lines([{"loss": number}])
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "x.json", {"loss": [number]})
    assert not [*tmp_path.iterdir()]


def test_every_json_dump_of_the_project_is_strict() -> None:
    lenient = []
    for folder in ("rosa_kernels", "rosa_train", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                called = ast.unparse(node.func)
                strict = any(word.arg == "allow_nan" for word in node.keywords)
                if called in ("json.dump", "json.dumps") and not strict:
                    lenient.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not lenient
