"""Writes an adapter to files with PEFT's names. Nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from rosa_kernels.masks.targets import find_targets, layer_shape
from rosa_kernels.nn import RosaLinear
from rosa_kernels.nn.wrapped import get_module, named_parameters, unwrapped
from rosa_train.adapters.config_json import FORMAT_VERSION, LORA, ROSA, to_json
from rosa_train.adapters.state import AdapterSpec, adapter_state, saved_parameters
from rosa_train.adapters.switch import adapter_targets
from rosa_train.adapters.tensors import (
    COL,
    CONFIG_NAME,
    CROW,
    LORA_A,
    LORA_B,
    PREFIX,
    VALUES,
    WEIGHTS_NAME,
)
from rosa_train.files import absolute_if_folder, replacing, write_json


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter to `directory` as adapter_config.json and adapter_model.safetensors.

    An adapter with only low-rank branches is saved as a LoRA that PEFT can load. Writing is atomic:
    if it fails, an earlier adapter in the folder is unchanged. The names in the files are those of
    the plain model, also if torch.compile or another wrapper is around it or its parts.

    Args:
        model: a model with adapters.
        directory: the folder to write.
        adapter_name: the adapter's name. By default it is the active adapter.
        base_model_name_or_path: the base model to record, by default that of the model's config.
            A folder is recorded by its absolute path.

    Raises:
        ValueError: there is no such adapter, or it has no branches yet. One of its tensors is
            sharded, or on the meta device.
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError

    spec = adapter_state(model).spec(adapter_name)
    layers = adapter_targets(model, spec.name)
    tensors: dict[str, Tensor] = {}
    nnz = 0
    for name, layer in layers.items():
        adapter = layer.adapter(spec.name)
        parts = {LORA_A: adapter.lora_a, LORA_B: adapter.lora_b, VALUES: adapter.values}
        if adapter.pattern is not None:
            parts |= {CROW: adapter.pattern.crow_indices, COL: adapter.pattern.col_indices}
            nnz += adapter.pattern.nnz
        tensors |= {f"{name}.{part}": t for part, t in parts.items() if t is not None}
    if not tensors:
        raise ValueError(
            f"save_adapter: expected an adapter with a branch, got {spec.name!r} of method "
            f"{spec.method.name} before its masks are set"
        )
    pure = all(rank > 0 for rank in spec.ranks.values()) and not any(
        name.endswith(VALUES) for name in tensors
    )
    tensors |= _saved_values(model, spec)
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "__tensor_flatten__"):
            got = "one on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise ValueError(
                f"save_adapter: expected whole tensors with data, got {got} in {name}; gather it "
                "first, or save before accelerate offloads it"
            )
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(
            getattr(unwrapped(model), "config", None), "_name_or_path", None
        )
    if base_model_name_or_path:
        base_model_name_or_path = absolute_if_folder(base_model_name_or_path)
    config = to_json(
        spec,
        peft_type=LORA if pure else ROSA,
        target_modules=_rule(model, spec, layers),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        density=nnz / sum(m * n for m, n in shapes.values()),
        base_model_name_or_path=base_model_name_or_path or None,
    )
    metadata = {
        "format": "pt",
        "rosa_format_version": str(FORMAT_VERSION),
        "method": spec.method.name,
        # The tensors of the sparse branch determine m, but not n.
        "shapes": json.dumps(shapes, allow_nan=False),
    }
    with replacing(directory, last=CONFIG_NAME) as folder:
        write_json(folder / CONFIG_NAME, config)
        try:
            _write_tensors(folder / WEIGHTS_NAME, tensors, metadata)
        except SafetensorError as error:  # safetensors raises it for a full disk
            raise OSError(f"save_adapter: {error}, writing to {directory}") from error


def _saved_values(model: nn.Module, spec: AdapterSpec) -> dict[str, Tensor]:
    """The values of an adapter's modules to save, by module and parameter name."""
    state = adapter_state(model)
    live = state.active == spec.name
    aside = state.base | state.saved.get(spec.name, {})
    names = {id(p): name for name, p in saved_parameters(model, spec).items()}
    return {
        f"{module}.{name}": parameter if live else aside[names[id(parameter)]]
        for module in spec.modules_to_save
        for name, parameter in named_parameters(get_module(model, module))
    }


def _rule(model: nn.Module, spec: AdapterSpec, layers: Mapping[str, RosaLinear]) -> str | list[str]:
    """The rule that chose the layers, or the layers' names if the rule gives other layers."""
    rule = spec.target_modules
    try:
        found = find_targets(model, rule, spec.exclude_modules, spec.modules_to_save)
    except ValueError:
        found = {}
    if set(found) == set(layers):
        return rule if isinstance(rule, str) else [*rule]
    return [*layers]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # The tensors are cloned because safetensors refuses those that share memory.
    plain = {PREFIX + name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(plain, path, metadata=metadata)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order.

    Equal adapters then have equal files.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(
            header, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
