"""Adapters as files: PEFT's names, nothing pickled, all of it checked before it touches a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import find_targets, layer_shape, saved_modules
from rosa_kernels.nn import RosaLinear
from rosa_train.adapters.attach import install
from rosa_train.adapters.config_json import (
    FORMAT_VERSION,
    LORA,
    ROSA,
    read_config,
    to_json,
)
from rosa_train.adapters.state import AdapterSpec, attached, saved_parameters, set_requires_grad
from rosa_train.adapters.switch import adapter_targets, delete_adapter
from rosa_train.adapters.tensors import (
    COL,
    CONFIG_NAME,
    CROW,
    LORA_A,
    LORA_B,
    PREFIX,
    VALUES,
    WEIGHTS_NAME,
    AdapterFile,
)
from rosa_train.files import replacing


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter to `directory` as adapter_config.json and adapter_model.safetensors.

    An adapter of nothing but low-rank branches is a LoRA that PEFT loads. Atomic: if writing fails,
    an adapter that was there before is there still.

    Args:
        model: a model with adapters.
        directory: where to.
        adapter_name: which adapter; by default the active one.
        base_model_name_or_path: recorded; by default what the model's config says.

    Raises:
        ValueError: no such adapter, or one that has no branches yet.
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError

    spec = attached(model).spec(adapter_name)
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
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
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
        # The sparse branch's tensors tell m, but not n.
        "shapes": json.dumps(shapes),
    }
    with replacing(directory, last=CONFIG_NAME) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        try:
            _write_tensors(folder / WEIGHTS_NAME, tensors, metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"save_adapter: {error}, writing to {directory}") from error


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
) -> AdapterSpec:
    """Read an adapter that :func:`save_adapter` or PEFT wrote, and make it the active one.

    All of it is checked before the model is touched: an error leaves the model as it was.

    Args:
        model: the model it was trained on; it may have other adapters.
        directory: where adapter_config.json and adapter_model.safetensors are.
        adapter_name: what to call it.
        trainable: whether it shall train on.

    Raises:
        FileNotFoundError: no such files.
        ValueError: files that are malformed, an adapter of another model (with a table of shapes),
            missing or unexpected tensors, wrong dtypes, indices that are no CSR pattern, numbers
            that are not finite, a name that is taken.
        RuntimeError: an adapter is merged.
    """
    folder = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no directory"
            raise FileNotFoundError(f"load_adapter: expected {name} in {folder}, got {found}")
    config = read_config(folder / CONFIG_NAME)
    file = AdapterFile.read(folder / WEIGHTS_NAME, config)
    # PEFT adds the names that heads of other models have.
    names = [key for key, _ in model.named_modules()]
    saved = saved_modules(
        model, [s for s in config.modules_to_save if any(name.endswith(s) for name in names)]
    )
    live = {name: p for key, m in saved.items() for name, p in m.named_parameters(prefix=key)}
    file.check_model(model, live)
    targets = find_targets(
        model, config.target_modules, config.exclude_modules, config.modules_to_save
    )
    targets = file.check_targets(targets, config)
    spec = AdapterSpec(
        name=adapter_name,
        method=file.method,
        ranks={name: config.rank(name) for name in targets},
        alphas={name: config.alpha(name) for name in targets},
        nnz={name: p.nnz if (p := file.patterns.get(name)) else 0 for name in targets},
        dropout=float(config.lora_dropout),
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=tuple(saved),
        trainable=trainable,
    )
    install(model, spec, targets)
    try:
        _fill(model, spec, file, live)
    except BaseException:
        delete_adapter(model, adapter_name)
        raise
    return spec


@torch.no_grad()
def _fill(
    model: nn.Module, spec: AdapterSpec, file: AdapterFile, live: Mapping[str, Tensor]
) -> None:
    for name, layer in adapter_targets(model, spec.name).items():
        adapter, parts = layer.adapter(spec.name), file.layers[name]
        if adapter.lora_a is not None and adapter.lora_b is not None:
            adapter.lora_a.copy_(parts[LORA_A])
            adapter.lora_b.copy_(parts[LORA_B])
        if name in file.patterns:
            layer.set_pattern(file.patterns[name], parts[VALUES], spec.name)
    for name, parameter in live.items():
        parameter.copy_(file.saved[name])
    set_requires_grad(model)


def _saved_values(model: nn.Module, spec: AdapterSpec) -> dict[str, Tensor]:
    """The values of an adapter's modules to save, by the names their modules give them."""
    record = attached(model)
    live = record.active == spec.name
    aside = record.base | record.saved.get(spec.name, {})
    names = {id(p): name for name, p in saved_parameters(model, spec).items()}
    return {
        name: parameter if live else aside[names[id(parameter)]]
        for module in spec.modules_to_save
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module)
    }


def _rule(model: nn.Module, spec: AdapterSpec, layers: Mapping[str, RosaLinear]) -> str | list[str]:
    """What chose the layers, or their names where the caller chose others than the rule does."""
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

    # Cloned: safetensors refuses tensors that share memory.
    plain = {PREFIX + name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(plain, path, metadata=metadata)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Make equal adapters equal files: safetensors writes its metadata in a random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
