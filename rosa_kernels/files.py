"""A file that is replaced as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft to write, which becomes the file at `path` when all went well, on the disk first."""
    path = Path(path)
    # A process killed here leaves it behind: ".<name>.<8 hexadecimal digits>".
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        draft.chmod(0o644)  # safetensors makes files that only their owner may read
        fsync(draft)
        draft.replace(path)
        fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
