"""Writes folders and files so that they are replaced completely or not at all, and strict JSON."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosa_kernels.files import fsync, replacing_file

# Characters of strings that JSON does not escape by itself: line ends of str.splitlines, and halves
# of surrogate pairs, which UTF-8 cannot hold.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


@contextmanager
def replacing(
    directory: str | os.PathLike[str], last: str, stale: str | None = None
) -> Iterator[Path]:
    """A new folder to write into. If the block succeeds, its files move to `directory`.

    The files are flushed to the disk first. A `directory` that does not exist appears complete, by
    one rename. In a `directory` that exists, each new file or folder replaces its old one by a
    rename. Other files stay, except those that match the pattern `stale`.

    `last` is the file that makes the others valid. The old `last` is deleted before any file is
    replaced, and the new one is moved last. So a mixture of old and new files has no `last`. If
    something fails before the renames, such as a full disk, the directory does not change.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save: expected a directory, got the file {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A process that is killed here leaves this folder: ".<name>.<8 hexadecimal digits>".
    folder = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():  # safetensors makes files that only the owner may read
                path.chmod(folder.stat().st_mode & 0o666)
            fsync(path)
        fsync(folder)
        if directory.exists():
            _replace_files(folder, directory, last, stale)
        else:
            folder.rename(directory)
        fsync(directory.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def absolute_if_folder(name: str) -> str:
    """The absolute path, if `name` is a folder here. Otherwise it may be a name on the hub."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def write_file(path: Path, text: str) -> None:
    """Writes a text file. Readers see the old file or the whole new one."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON with readable letters. Without `indent` it is one line, for any reader.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_lines(rows: Iterable[Any]) -> str:
    """One line of strict JSON for each row."""
    return "".join(json_text(row) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Writes a file of strict JSON. Readers see the old file or the whole new one."""
    write_file(path, json_text(value, indent=2) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a file of JSON lines. A last line that a killed process tore is left out.

    Lines end only at line feeds. str.splitlines would also end them at U+2028, which a string may
    hold.

    Raises:
        ValueError: a complete line is not JSON. The message has file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected JSON, got {error}") from error
    return rows


def _replace_files(folder: Path, directory: Path, last: str, stale: str | None) -> None:
    new = sorted(path.name for path in folder.iterdir() if path.name != last)
    old = directory / last
    # A single new file beside an equal `last` needs only one rename, so no mixture can arise.
    if old.exists() and (len(new) > 1 or old.read_bytes() != (folder / last).read_bytes()):
        old.unlink()
        fsync(directory)
    for name in new:
        if (directory / name).is_dir():  # a rename replaces only an empty folder
            shutil.rmtree(directory / name)
        (folder / name).replace(directory / name)
    for path in directory.glob(stale) if stale else ():
        if path.name not in new:
            path.unlink()
    (folder / last).replace(old)
    fsync(directory)
