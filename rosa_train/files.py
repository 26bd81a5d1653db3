"""Folders of files, and text files, that are replaced as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rosa_kernels.files import fsync, replacing_file


@contextmanager
def replacing(
    directory: str | os.PathLike[str], last: str, stale: str | None = None
) -> Iterator[Path]:
    """A new folder to write files into, which become those of `directory` when all went well.

    The files are flushed to the disk first. A directory that is not there yet appears complete. In
    one that is, each file or folder is replaced by a rename, and others stay, but for files that
    match the pattern `stale`. `last` is the file without which the others count for nothing: the
    old one goes before any other is replaced, and the new one comes after them, so that no mixture
    of old and new ever looks whole. If anything fails before the renames (a full disk), the
    directory is as it was.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save: expected a directory, got the file {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A process killed here leaves it behind: ".<name>.<8 hexadecimal digits>".
    folder = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():  # safetensors makes files that only their owner may read
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


def write_file(path: Path, text: str) -> None:
    """Writes a text file that is never seen half written."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _replace_files(folder: Path, directory: Path, last: str, stale: str | None) -> None:
    new = sorted(path.name for path in folder.iterdir() if path.name != last)
    old = directory / last
    # One file beside an equal `last` is replaced in one rename: there is no mixture.
    if old.exists() and (len(new) > 1 or old.read_bytes() != (folder / last).read_bytes()):
        old.unlink()
        fsync(directory)
    for name in new:
        if (directory / name).is_dir():  # which no rename replaces unless it is empty
            shutil.rmtree(directory / name)
        (folder / name).replace(directory / name)
    for path in directory.glob(stale) if stale else ():
        if path.name not in new:
            path.unlink()
    (folder / last).replace(old)
    fsync(directory)
