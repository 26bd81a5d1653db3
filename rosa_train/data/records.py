"""Reads the records of JSON lines, a JSON array, CSV, or a data set by name.

Every record knows its place, because its errors often show much later. A missing field shows when
a template is filled, and a text that is too long when it is tokenised.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_FORMATS = ".jsonl, .json or .csv"
# owner/name or name, with the characters that the hub allows, and an optional configuration.
_NAME = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Record:
    """The named values of one record, and its place for messages, such as ``train.jsonl:12``."""

    fields: Mapping[str, Any]
    where: str


def read_records(
    source: str | Path, *, split: str | None = None, limit: int | None = None
) -> list[Record]:
    """Read a local file, or a data set of the package `datasets` by its name.

    ``*.jsonl`` and ``*.json`` hold one object per line. ``*.json`` may instead hold one array of
    objects. ``*.csv`` has a header. Files are UTF-8, with or without a byte order mark. Blank lines
    are skipped. Any other source is a name, ``name`` or ``name:configuration``. Only a name imports
    `datasets`, and only a name may use the network.

    Args:
        split: the split of a data set by name, by default "train". A slice such as
            ``train[:100]`` works too.
        limit: the number of records to read, from the first on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is malformed (the message has path, line and reason), there are no
            records, or `datasets` cannot load the name.
        ImportError: the source is a name, and the package `datasets` is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"read_records: expected limit >= 1, got {limit}")
    path = Path(source).expanduser()
    readers = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None and not path.exists() and (name := _NAME.fullmatch(str(source))):
        records = _read_named(name["name"], name["config"], split or "train", limit)
    else:
        if not path.exists():
            raise FileNotFoundError(
                f"read_records: expected a {_FORMATS} file or the name of a data set, "
                f"got {str(source)!r}, which is neither"
            )
        if reader is None or not path.is_file():
            kind = "a folder" if path.is_dir() else f"a {path.suffix or 'file without suffix'}"
            raise ValueError(f"read_records: expected a {_FORMATS} file, got {kind}: {path}")
        if split is not None:
            raise ValueError(
                f"read_records: expected no split with a local file, got split {split!r} of {path}"
            )
        records = list(islice(reader(path), limit))
    if not records:
        raise ValueError(f"read_records: expected at least one record, got none in {source}")
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines and their numbers, from 1.

    Lines end only at line feeds. str.splitlines would also split at U+2028 and U+0085, which JSON
    strings and CSV fields may hold. Lines are decoded one by one, so that an error knows its line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                hint = "; UTF-16?" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise ValueError(
                    f"read_records: {path}:{number}: expected UTF-8, "
                    f"got byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line{hint}"
                ) from None


def _read_json(path: Path) -> Iterator[Record]:
    first = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("[") and path.suffix.lower() == ".json":
            yield from _read_array(path)
            return
        first = False
        where = f"{path}:{number}"
        yield Record(_as_object(_parse(line, where), where), where)


def _read_array(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path))
    for index, value in enumerate(_parse(text, str(path), whole_file=True)):
        where = f"{path}[{index}]"
        yield Record(_as_object(value, where), where)


def _parse(text: str, where: str, *, whole_file: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if whole_file else ""
        reason = f"{error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        line, reason = "", str(error)
    raise ValueError(f"read_records: {where}{line}: expected JSON, got {reason}")


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    kind = names.get(type(value), "a number")
    raise ValueError(f"read_records: {where}: expected an object, got {kind}")


def _read_csv(path: Path) -> Iterator[Record]:
    header: list[str] = []
    for number, row in _csv_rows(path):
        where = f"{path}:{number}"
        if not header:
            header = row
            if "" in header or len({*header}) < len(header):
                raise ValueError(
                    f"read_records: {where}: expected a header of distinct names, "
                    f"got {', '.join(map(repr, header))}"
                )
        elif len(row) != len(header):
            raise ValueError(
                f"read_records: {where}: expected {len(header)} fields "
                f"({', '.join(header)}), got {len(row)}"
            )
        else:
            yield Record(dict(zip(header, row, strict=True)), where)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, and their first lines. A quoted field may span several lines."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    start = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"read_records: {path}:{start}: expected CSV, got {error}") from None
        if row:
            yield start, row
        start = reader.line_num + 1


def _read_named(name: str, config: str | None, split: str, limit: int | None) -> list[Record]:
    full = f"{name}:{config}" if config else name
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"read_records: expected the package datasets for the data set {full!r}, got none: "
            "pip install 'rosa-kernels[train]'"
        ) from error
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # it has many kinds, which mean the same to the caller
        raise ValueError(
            f"read_records: expected a {_FORMATS} file or the name of a data set, got {full!r}; "
            f"datasets did not load its split {split!r}: {type(error).__name__}: {error}"
        ) from error
    return [
        Record(dict(row), f"{full}[{split}]:{index}")
        for index, row in enumerate(islice(rows, limit))
    ]
