"""Reads an adapter from files. Everything is checked before the model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import check_without_peft, find_targets, saved_modules
from rosa_kernels.nn.wrapped import named_modules, named_parameters
from rosa_train.adapters.attach import install
from rosa_train.adapters.config_json import read_config
from rosa_train.adapters.state import AdapterSpec, set_requires_grad
from rosa_train.adapters.switch import adapter_targets, delete_adapter
from rosa_train.adapters.tensors import (
    CONFIG_NAME,
    LORA_A,
    LORA_B,
    VALUES,
    WEIGHTS_NAME,
    AdapterFile,
)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
) -> AdapterSpec:
    """Read an adapter that :func:`save_adapter` or PEFT wrote, and make it the active one.

    Everything is checked before the model is changed. An error leaves the model unchanged.

    Args:
        model: the model on which the adapter was trained. It may have other adapters.
        directory: the folder with adapter_config.json and adapter_model.safetensors.
        adapter_name: the adapter's name in this model.
        trainable: whether the adapter continues to train.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed, or the adapter is of another model (the message has a
            table of shapes). Tensors are missing or unexpected, or have a wrong dtype. Indices
            are not a CSR pattern, or numbers are not finite. The name is taken. The model has an
            adapter of PEFT, or is offloaded, or DistributedDataParallel wraps it and the adapter
            is to train.
        RuntimeError: an adapter is merged.
    """
    folder = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no directory"
            pickled = ""
            if name == WEIGHTS_NAME and "adapter_model.bin" in found:
                pickled = (
                    "; a .bin file is pickled and can run code, so it is not read: load it with "
                    "PEFT and save it with save_pretrained"
                )
            raise FileNotFoundError(
                f"load_adapter: expected {name} in {folder}, got {found}{pickled}"
            )
    check_without_peft(model, "load_adapter")
    config = read_config(folder / CONFIG_NAME)
    file = AdapterFile.read(folder / WEIGHTS_NAME, config)
    # PEFT also lists names of heads that only other models have.
    names = [key for key, _ in named_modules(model)]
    saved = saved_modules(
        model, [s for s in config.modules_to_save if any(name.endswith(s) for name in names)]
    )
    file.check_model(model, _parameters_of(saved))
    targets = find_targets(
        model,
        config.target_modules,
        config.exclude_modules,
        config.modules_to_save,
        strict=False,
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
        _fill(model, spec, file, _parameters_of(saved))
    except BaseException:
        delete_adapter(model, adapter_name)
        raise
    return spec


def _parameters_of(saved: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of modules to save. An adapter that unties them replaces them."""
    return {f"{key}.{name}": p for key, m in saved.items() for name, p in named_parameters(m)}


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
