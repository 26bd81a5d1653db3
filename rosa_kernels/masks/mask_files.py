"""Saves and loads the masks of a model as one safetensors file, which is validated when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from rosa_kernels.files import read_safetensors, replacing_file
from rosa_kernels.pattern import CsrPattern

# The name of the format is older than this module. It stays, so that older files still load.
_FORMAT, _VERSION = "rosa_train.masks", "1"


def save_masks(masks: Mapping[str, CsrPattern], path: str | os.PathLike[str]) -> None:
    """Write masks as one safetensors file: 4 bytes for each nonzero and 4 for each row.

    The tensors are ``<name>.crow_indices`` and ``<name>.col_indices``, int32. The metadata are the
    format, the version and the shapes (JSON). The file is replaced as a whole: after a crash it is
    either the old or the new one.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, pattern in masks.items():
        pattern.check_unchanged()
        # Always a copy, because safetensors refuses tensors that share memory.
        tensors[f"{name}.crow_indices"] = pattern.crow_indices.to("cpu", copy=True).contiguous()
        tensors[f"{name}.col_indices"] = pattern.col_indices.to("cpu", copy=True).contiguous()
    shapes = json.dumps(
        {name: list(pattern.shape) for name, pattern in masks.items()}, allow_nan=False
    )
    with replacing_file(path) as draft:
        save_file(tensors, draft, {"format": _FORMAT, "version": _VERSION, "shapes": shapes})


def load_masks(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, CsrPattern]:
    """Read masks that :func:`save_masks` wrote, onto the CPU. Every mask is validated.

    Args:
        path: the file.
        shapes: (m, n) of the model's targets, by name. Other modules or shapes are refused.

    Raises:
        ValueError: the file does not hold masks or is truncated; indices are out of range or
            unsorted; the masks are of another model (the message has a table).
    """
    tensors, metadata = read_safetensors(path, "load_masks")
    found = _shapes_in(metadata, path)
    if shapes is not None:
        _check_model(found, {name: (m, n) for name, (m, n) in shapes.items()}, path)
    parts = ("crow_indices", "col_indices")
    expected = {f"{name}.{part}" for name in found for part in parts}
    if tensors.keys() != expected:
        raise ValueError(
            "load_masks: expected crow_indices and col_indices of each module, got "
            f"{sorted(expected - tensors.keys())[:5]} missing and "
            f"{sorted(tensors.keys() - expected)[:5]} unexpected in {os.fspath(path)}"
        )
    masks = {}
    for name, shape in found.items():
        crow, col = (tensors[f"{name}.{part}"] for part in parts)
        try:
            for part, index in zip(parts, (crow, col), strict=True):
                if index.dtype != torch.int32:
                    raise TypeError(f"load_masks: expected {part} of int32, got {index.dtype}")
            masks[name] = CsrPattern(crow, col, shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, for {name!r} in {os.fspath(path)}") from error
    return masks


def _shapes_in(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> dict[str, tuple[int, int]]:
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"load_masks: expected format {_FORMAT}, version {_VERSION}, got "
            f"{metadata.get('format')}, version {metadata.get('version')} in {os.fspath(path)}"
        )
    try:
        shapes = json.loads(metadata["shapes"])
        if not all(type(size) is int for m, n in shapes.values() for size in (m, n)):
            raise TypeError("sizes that are not integers")
        return {name: (m, n) for name, (m, n) in shapes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"load_masks: expected a shape (m, n) of each module, got {error!r} in "
            f"{os.fspath(path)}"
        ) from error


def _check_model(
    found: Mapping[str, tuple[int, int]],
    wanted: Mapping[str, tuple[int, int]],
    path: str | os.PathLike[str],
) -> None:
    differing = [
        (name, str(found.get(name, "absent")), str(wanted.get(name, "absent")))
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if not differing:
        return
    rows = [("module", "mask", "model"), *differing[:20]]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    table = "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
    more = len(differing) - 20
    raise ValueError(
        f"load_masks: expected masks of this model, got others for {len(differing)} modules in "
        f"{os.fspath(path)}:\n{table}" + (f"\n  and {more} more" if more > 0 else "")
    )
