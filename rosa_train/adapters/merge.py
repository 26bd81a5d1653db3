"""Merges adapters into the weights, unmerges and removes them, and exports plain models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import check_without_peft, shared_weights
from rosa_kernels.nn import RosaLinear, base_weights
from rosa_kernels.nn.linear import SEPARATE
from rosa_kernels.nn.wrapped import named_modules, named_parameters, unwrapped
from rosa_train.adapters.state import (
    activate,
    adapter_state,
    check_not_merged,
    forget,
    put_modules,
    retie,
    rosa_modules,
)
from rosa_train.adapters.switch import adapter_targets
from rosa_train.files import replacing, write_json

# A folder with this file is an export, so that another may replace it.
RECEIPT = "merged_from.json"

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def merge(model: nn.Module, *, safe: bool = False, keep_base: bool = True) -> None:
    """Merge the active adapter into every weight: W <- round(W + S + (alpha / rank) B A).

    Either all layers are merged or none. Checks come first. If a layer still fails, for example
    for lack of memory, the others are unmerged, provided that `keep_base` is set.

    Args:
        model: a model with an active adapter.
        safe: raise an error, before any weight changes, if a merged weight is not finite.
        keep_base: keep a copy of each W on the host, so that :func:`unmerge` can restore it bit by
            bit. Without the copies, the base model is lost.

    Raises:
        ValueError: no adapter is active, or with `safe` a layer's merged weight has NaN or Inf.
        RuntimeError: an adapter is merged already. A weight cannot be written to, or shares memory
            with another tensor.
    """
    check_not_merged(model, "merge")
    layers = {name: x for name, x in adapter_targets(model).items() if not x.adapter().is_empty}
    _check_unshared("merge", model, layers)
    for name, layer in layers.items():
        path, reason = layer.path()
        if path == SEPARATE:
            raise RuntimeError(f"merge: expected weights that may change, got {name}: {reason}")
        if safe:
            _check_finite(name, layer.merged_weight())
    done: list[RosaLinear] = []
    try:
        for layer in layers.values():
            layer.merge(keep_base=keep_base)
            done.append(layer)
    except BaseException:
        for layer in done if keep_base else []:
            layer.unmerge()
        raise
    if not keep_base:
        adapter_state(model).base.clear()


def unmerge(model: nn.Module) -> None:
    """Restore every W bit by bit from the copies that :func:`merge` kept.

    Raises:
        RuntimeError: nothing is merged, or the copies were not kept. Nothing is changed then.
    """
    layers = {name: layer for name, layer in rosa_modules(model).items() if layer.merged}
    if not layers:
        raise RuntimeError("unmerge: expected a merged adapter, got none")
    for layer in layers.values():
        layer.unmerge()


def merged_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is merged into the weights, or None."""
    return next((m.merged for m in rosa_modules(model).values() if m.merged is not None), None)


def unload(model: nn.Module) -> nn.Module:
    """Remove all adapters in place, and return the model.

    Plain layers with the base weights and the layers' hooks remain. The parameters that trained
    before the first adapter train again.

    Raises:
        RuntimeError: an adapter is merged. Unmerge it first. Or accelerate has hooked a module.
    """
    check_not_merged(model, "unload")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise RuntimeError(
            "unload: expected a model without accelerate's hooks, which name the layers' tensors, "
            "got one with; call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    activate(model, None)
    retie(model)
    put_modules(model, {name: layer.to_linear() for name, layer in rosa_modules(model).items()})
    trained_before = adapter_state(model).trained_before
    if trained_before is not None:
        for name, parameter in named_parameters(model):
            parameter.requires_grad_(name in trained_before)
    forget(model)
    return model


def export_merged(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    safe: bool = True,
    overwrite: bool = False,
) -> None:
    """Save the model with its active adapter merged, as an ordinary Hugging Face folder.

    The folder is first written with the base weights. Then each layer's merged weight is computed
    and written over its base weight in the file. So the peak memory is that of the model and one
    layer, and the model itself does not change by a bit. The folder appears complete or not at all.
    Names are those of the plain model. If a module to save was untied, the config says so.

    Args:
        model: a transformers model with an active adapter.
        tokenizer: the tokenizer to save too, or None.
        directory: the folder to write, new or empty.
        safe: raise an error if a merged weight is not finite.
        overwrite: replace the export that is in `directory`. Other files in it stay.

    Raises:
        TypeError: the model is not of transformers.
        FileExistsError: `directory` is the base model's, or has files, and is not an export that
            `overwrite` allows to replace. Nothing is written.
        ValueError: no adapter is active, or with `safe` a layer's merged weight has NaN or Inf.
        RuntimeError: the model's class saves its weights under other names or in other shapes. A
            weight is on the meta device, or shares memory with another tensor.
    """
    check_without_peft(model, "export_merged")
    model = unwrapped(model)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"export_merged: expected a transformers model, got {type(model).__name__}")
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    check_export_folder(directory, base, overwrite=overwrite)
    merged = merged_adapter(model)
    layers = {n: x for n, x in adapter_targets(model, merged).items() if not x.adapter().is_empty}
    _check_unshared("export_merged", model, layers)
    tensors = _plain_state_dict(model)
    _check_data(tensors)
    files = replacing(directory, last="config.json", stale="model*.safetensors*")
    with files as folder, ExitStack() as stack:
        if merged is None:
            stack.enter_context(base_weights(model))
        with _config_of_untied(model):
            model.save_pretrained(folder, state_dict=tensors)
        if merged is None:
            weights = ((f"{name}.weight", x.merged_weight()) for name, x in layers.items())
            _overwrite(folder, weights, safe)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / RECEIPT, {"base_model_name_or_path": base or None})


def check_export_folder(
    directory: str | os.PathLike[str], base: str | None, *, overwrite: bool = False
) -> None:
    """Raise `FileExistsError` unless an export may write into the folder.

    The folder must be new or empty. With `overwrite` it may be an earlier export. It must not be
    the folder of the base model, which may be an earlier export, too.
    """
    folder = Path(directory)
    if not folder.exists():
        return
    if base and Path(base).is_dir() and folder.samefile(base):
        raise FileExistsError(
            f"export: expected another folder than the base model's, got {folder}"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"export: expected a folder, got the file {folder}")
    found = sorted(path.name for path in folder.iterdir())
    if not found or (overwrite and RECEIPT in found):
        return
    wanted = "a new or empty folder"
    if RECEIPT in found:
        wanted += ", or --overwrite to replace the earlier export"
    elif overwrite:
        wanted += f", or an earlier export with {RECEIPT}"
    raise FileExistsError(f"export: expected {wanted}, got {folder} with {', '.join(found[:4])}")


def _check_finite(name: str, weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError(f"merge: expected finite merged weights, got NaN or Inf in {name}")


def _check_unshared(op: str, model: nn.Module, layers: Mapping[str, RosaLinear]) -> None:
    shared = shared_weights(model)
    for name in layers:
        if name in shared:
            raise RuntimeError(
                f"{op}: expected weights that share memory with no other tensor, got {name}, which "
                f"is tied to {shared[name]}"
            )


def _check_data(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(
                f"export_merged: expected weights with data, got {name} on the meta device; export "
                "before accelerate offloads it"
            )


@contextmanager
def _config_of_untied(model: Any) -> Iterator[None]:
    """A context in which the config says that no weights are tied, if an adapter untied them."""
    configs = []
    if adapter_state(model).untied:
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                configs.append(config)
    for config in configs:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in configs:
            config.tie_word_embeddings = True


def _plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's present tensors without those of adapters. Nothing is copied."""
    tensors: dict[str, Tensor] = {}
    adapters = tuple(f"{name}.adapters." for name in rosa_modules(model))
    for prefix, module in named_modules(model, remove_duplicate=False):
        if f"{prefix}.".startswith(adapters):
            continue
        here = {k: b for k, b in module._buffers.items() if k not in _unsaved_buffers(module)}
        for name, tensor in (module._parameters | here).items():
            if tensor is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return tensors


def _unsaved_buffers(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _overwrite(folder: Path, weights: Iterator[tuple[str, Tensor]], safe: bool) -> None:
    """Write each tensor over the one of the same name in a folder of safetensors files."""
    with _open_safetensors(folder) as places:
        for name, weight in weights:
            if safe:
                _check_finite(name.removesuffix(".weight"), weight)
            if name not in places:
                raise RuntimeError(
                    f"export_merged: expected {name} among the weights that the model saves, got "
                    f"names like {next(iter(places))}"
                )
            file, start, entry = places[name]
            expected = (_SAFETENSORS_DTYPES[weight.dtype], [*weight.shape])
            if (entry["dtype"], entry["shape"]) != expected:
                raise RuntimeError(
                    f"export_merged: expected {name} saved as {expected[0]} of shape "
                    f"{expected[1]}, got {entry['dtype']} of shape {entry['shape']}"
                )
            data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
            file.seek(start + entry["data_offsets"][0])
            file.write(data.data)


@contextmanager
def _open_safetensors(
    folder: Path,
) -> Iterator[Mapping[str, tuple[BinaryIO, int, dict[str, Any]]]]:
    """By tensor name in a folder: the file, the offset of the file's data, the header entry."""
    places: dict[str, tuple[BinaryIO, int, dict[str, Any]]] = {}
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(path.open("r+b"))
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    places[name] = (file, 8 + size, entry)
        yield places
