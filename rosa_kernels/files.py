"""Replace a file as a whole or not at all, and read a safetensors file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a draft to write. After the block, the draft replaces the file at `path`.

    The draft is on the disk before it replaces the file. If the block raises, nothing is replaced.
    """
    path = Path(path)
    # A process that is killed leaves the draft behind: ".<name>.<8 hexadecimal digits>".
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


def read_safetensors(
    path: str | os.PathLike[str], op: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, onto the CPU, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete safetensors file. The message begins with `op`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{op}: expected a safetensors file, got {os.fspath(path)}: {error}"
        ) from error
