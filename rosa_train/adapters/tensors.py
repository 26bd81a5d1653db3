"""Reads and checks the tensors of an adapter file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.targets import is_layer, layer_shape, why_not_a_target
from rosa_kernels.nn.wrapped import named_modules
from rosa_train.adapters.config_json import LORA, ROSA, AdapterConfig
from rosa_train.methods.method import METHODS, Method

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
VALUES, CROW, COL = "rosa_S.values", "rosa_S.crow_indices", "rosa_S.col_indices"
_SPARSE = {VALUES, CROW, COL}
# The names of dtypes in a safetensors header.
_FLOATS = ("F32", "BF16", "F16", "F64")
_DTYPES = {LORA_A: _FLOATS, LORA_B: _FLOATS, VALUES: ("F32", "F64"), CROW: ("I32",), COL: ("I32",)}
# The number of rows in the table of differing shapes.
_ROWS_SHOWN = 10


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter file. Each layer's tensors fit each other and the config."""

    path: Path
    method: Method
    shapes: dict[str, tuple[int, int]]
    layers: dict[str, dict[str, Tensor]]
    patterns: dict[str, CsrPattern]
    saved: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path, config: AdapterConfig) -> AdapterFile:
        """Read the file, and raise ValueError if it is malformed or does not fit the config."""
        tensors, metadata = _read_tensors(path)
        layers: dict[str, dict[str, Tensor]] = {}
        saved: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not key.startswith(PREFIX):
                raise _bad(path, f"expected tensors called {PREFIX}<module>.<part>, got {key}")
            name = key.removeprefix(PREFIX)
            part = _part(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise _bad(path, f"expected finite numbers, got NaN or Inf in {key}")
            if part is None:
                saved[name] = tensor
            else:
                layers.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
        noted = _noted_shapes(path, metadata) if config.peft_type == ROSA else {}
        shapes, patterns = {}, {}
        for name, parts in layers.items():
            _check_parts(path, name, parts, config)
            shapes[name] = _shape(path, name, parts, noted)
            if VALUES in parts:
                patterns[name] = _pattern(path, name, parts, shapes[name])
        method = METHODS.get(config.method or metadata.get("method", "lora"))
        low_rank = any(LORA_A in parts for parts in layers.values())
        if (
            method is None
            or (low_rank and not method.low_rank)
            or (patterns and not method.sparse)
            or method.full
        ):
            branches = [w for w, there in (("low-rank", low_rank), ("sparse", patterns)) if there]
            raise _bad(
                path,
                f"expected a method with {' and '.join(branches) or 'no'} branches, got "
                f"{config.method or metadata.get('method')!r}",
            )
        return cls(path, method, shapes, layers, patterns, saved)

    def check_model(self, model: nn.Module, live: Mapping[str, Tensor]) -> None:
        """Raise ValueError if a tensor does not fit the model."""
        modules = dict(named_modules(model))
        rows: list[tuple[str, str, str]] = []
        for name, shape in self.shapes.items():
            module = modules.get(name)
            here = layer_shape(module) if module is not None and is_layer(module) else None
            if here != shape:
                reason = why_not_a_target(model, name) if module is not None else "no such layer"
                rows.append((name, str(shape), str(here) if here else reason))
        for name, tensor in self.saved.items():
            if name in live and live[name].shape != tensor.shape:
                rows.append((name, str(tuple(tensor.shape)), str(tuple(live[name].shape))))
        if rows:
            shown = [("module", "adapter's shape", "model's shape"), *rows[:_ROWS_SHOWN]]
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            lines = [
                " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in shown
            ]
            more = len(rows) - _ROWS_SHOWN
            lines += [f"and {more} more"] if more > 0 else []
            raise _bad(
                self.path,
                f"expected an adapter of this model, got one of another: {len(rows)} of "
                f"{len(self.shapes) + len(self.saved)} modules differ\n" + "\n".join(lines),
            )
        self._same_names("modules to save", self.saved, live)

    def check_targets(
        self, targets: Mapping[str, nn.Module], config: AdapterConfig
    ) -> dict[str, nn.Module]:
        """The targets that the file is for.

        Raises:
            ValueError: the file lacks the tensors of a target, or has tensors of another layer.
        """
        if config.layers_to_transform is not None:
            targets = {name: module for name, module in targets.items() if name in self.layers}
        # A layer may have rank 0 and no nonzeros. It then has no tensors.
        bare = {name for name in targets if not config.rank(name)}
        self._same_names("layers", self.layers, {n: 0 for n in targets if n not in bare}, bare)
        for name in bare - set(self.layers):
            self.layers[name] = {}
        return dict(targets)

    def _same_names(
        self,
        what: str,
        got: Mapping[str, Any],
        expected: Mapping[str, Any],
        optional: set[str] | None = None,
    ) -> None:
        missing = [name for name in expected if name not in got]
        unexpected = [n for n in got if n not in expected and n not in (optional or ())]
        if missing or unexpected:
            parts = [
                f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for word, names in (("missing", missing), ("unexpected", unexpected))
                if names
            ]
            raise _bad(
                self.path,
                f"expected tensors of the {what} that {CONFIG_NAME} names, got "
                + " and ".join(parts),
            )


def _part(key: str) -> str | None:
    return next((part for part in _DTYPES if key.endswith(f".{part}")), None)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [*file.keys()]
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                allowed = _DTYPES.get(_part(name) or "", _FLOATS)
                if dtype not in allowed:
                    raise _bad(path, f"expected {name} of {' or '.join(allowed)}, got {dtype}")
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _bad(path, f"expected a complete safetensors file, got: {error}") from error


def _noted_shapes(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    try:
        shapes = json.loads(metadata.get("shapes", ""))
        noted = {str(name): (m, n) for name, (m, n) in shapes.items()}
        if not all(type(size) is int and size >= 0 for shape in noted.values() for size in shape):
            raise ValueError("sizes that are not integers >= 0")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(path, f"expected the layers' shapes in the metadata, got: {error}") from error
    return noted


def _check_parts(path: Path, name: str, parts: Mapping[str, Tensor], config: AdapterConfig) -> None:
    rank = config.rank(name)
    missing = [part for part in (LORA_A, LORA_B) if rank and part not in parts]
    if _SPARSE & set(parts):
        missing += sorted(_SPARSE - set(parts))
    unexpected = [part for part in (LORA_A, LORA_B) if not rank and part in parts]
    if config.peft_type == LORA:
        unexpected += sorted(_SPARSE & set(parts))
    for what, found in (("missing", missing), ("unexpected", unexpected)):
        if found:
            raise _bad(
                path,
                f"expected the tensors of a {config.peft_type} of rank {rank} in {name}, got "
                f"{', '.join(found)} {what}",
            )
    for part, tensor in parts.items():
        dims = 2 if part in (LORA_A, LORA_B) else 1
        if tensor.dim() != dims:
            shape = tuple(tensor.shape)
            raise _bad(path, f"expected {name}.{part} with {dims} dimensions, got shape {shape}")
    if rank and (parts[LORA_A].shape[0] != rank or parts[LORA_B].shape[1] != rank):
        raise _bad(
            path,
            f"expected rank {rank} in {name} as {CONFIG_NAME} says, got A of shape "
            f"{tuple(parts[LORA_A].shape)} and B of shape {tuple(parts[LORA_B].shape)}",
        )


def _shape(
    path: Path,
    name: str,
    parts: Mapping[str, Tensor],
    noted: Mapping[str, tuple[int, int]],
) -> tuple[int, int]:
    if LORA_A in parts:
        shape = (parts[LORA_B].shape[0], parts[LORA_A].shape[1])
    elif name in noted:
        shape = noted[name]
    else:
        raise _bad(path, f"expected the shape of {name} in the metadata, got none")
    rows = len(parts[CROW]) - 1 if CROW in parts else shape[0]
    if noted.get(name, shape) != shape or rows != shape[0]:
        raise _bad(
            path,
            f"expected one shape of {name}, got {shape} from its tensors, "
            f"{noted.get(name)} from the metadata and {rows} rows from {CROW}",
        )
    return shape


def _pattern(
    path: Path, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]
) -> CsrPattern:
    try:
        pattern = CsrPattern(parts[CROW], parts[COL], shape)
    except (ValueError, TypeError) as error:
        raise _bad(path, f"expected valid indices of {name}, got: {error}") from error
    if parts[VALUES].shape != (pattern.nnz,):
        raise _bad(
            path,
            f"expected {pattern.nnz} values of {name}, one per index, got {len(parts[VALUES])}",
        )
    return pattern


def _bad(path: Path, message: str) -> ValueError:
    return ValueError(f"load_adapter: {message}, in {path}")
