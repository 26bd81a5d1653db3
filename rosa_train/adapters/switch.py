"""Adapters on a model: attach, switch, disable and delete them, and what of it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.targets import ALL_LINEAR, layer_shape, pattern_key, saved_modules
from rosa_kernels.nn import RosaLinear
from rosa_train.adapters.attach import init_lora_a_, install
from rosa_train.adapters.state import (
    AdapterSpec,
    activate,
    attached,
    check_not_merged,
    rosa_modules,
    saved_parameters,
    set_requires_grad,
)
from rosa_train.methods.budget import Allocation
from rosa_train.methods.method import Method, method_named


def attach(
    model: nn.Module,
    method: str | Method,
    allocation: Allocation,
    targets: Mapping[str, nn.Module],
    *,
    alpha: float = 16.0,
    dropout: float = 0.05,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_name: str = "default",
    modules_to_save: Sequence[str] = (),
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] | None = None,
    seed: int = 42,
    trainable: bool = True,
) -> None:
    """Give the target layers of a model an adapter, make it the active one and freeze the rest.

    In place: each target becomes a :class:`rosa_kernels.RosaLinear` that keeps its weight and bias.
    A is Kaiming-uniform like PEFT's, from a generator seeded with `seed` and the module's name, so
    that it depends on no other module; B is zero. The sparse branch comes with :func:`set_masks`.

    The method ``full`` adds no adapter: every parameter of the model trains.

    Args:
        model: the model.
        method: a method or its name.
        allocation: ranks and nonzeros of exactly these targets.
        targets: layers of the model, from :func:`find_targets`.
        alpha: the low-rank branch is scaled by alpha / rank.
        dropout: on the input of the low-rank branch.
        alpha_pattern: another alpha for the layers whose name ends in a match of the key.
        adapter_name: what to call it; no dots.
        modules_to_save: names of modules that train in full. Of tied weights, both ends train.
        target_modules, exclude_modules: recorded for ``adapter_config.json``.
        seed: of A.
        trainable: False for an adapter that is only used.

    Raises:
        ValueError: an adapter of that name is there, targets that are not the model's or not the
            allocation's, a module to save that is missing or also a target, numbers out of range.
        RuntimeError: an adapter is merged.
    """
    method = method_named(method)
    if method.full:
        if adapter_names(model):
            raise ValueError(
                f"attach: expected a model without adapters for {method.name}, "
                f"got {adapter_names(model)}"
            )
        model.requires_grad_(True)
        return
    alpha_pattern = alpha_pattern or {}
    keys = {name: pattern_key(alpha_pattern, name) for name in targets}
    alphas = {n: float(alpha if key is None else alpha_pattern[key]) for n, key in keys.items()}
    spec = AdapterSpec(
        name=adapter_name,
        method=method,
        ranks=dict(allocation.ranks),
        alphas=alphas,
        nnz=dict(allocation.nnz),
        dropout=float(dropout),
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=tuple(saved_modules(model, modules_to_save)),
        trainable=trainable,
    )
    install(model, spec, targets)
    for name, layer in adapter_targets(model, adapter_name).items():
        lora_a = layer.adapters[adapter_name].lora_a
        if isinstance(lora_a, nn.Parameter):
            init_lora_a_(lora_a, name, seed)


def set_masks(
    model: nn.Module, masks: Mapping[str, CsrPattern], adapter_name: str | None = None
) -> None:
    """Give an adapter its sparse branch: the mask of each of its layers, and values of zero.

    The values are new Parameters; an optimizer has to be told of them.

    Raises:
        ValueError: a method without a sparse branch, masks that are not of exactly the adapter's
            layers, or of other shapes. Nothing is changed then.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "set_masks")
    spec = adapter_spec(model, adapter_name)
    layers = adapter_targets(model, spec.name)
    if not spec.method.sparse:
        raise ValueError(
            f"set_masks: expected a method with a sparse branch, got {spec.method.name}"
        )
    if set(masks) != set(layers):
        odd = sorted(set(masks) ^ set(layers))
        raise ValueError(
            f"set_masks: expected masks of the {len(layers)} layers of adapter {spec.name!r}, got "
            f"{len(masks)}, differing in {', '.join(odd[:5])}"
        )
    for name, layer in layers.items():
        if masks[name].shape != layer_shape(layer):
            raise ValueError(
                f"set_masks: expected a mask of shape {layer_shape(layer)} for {name}, "
                f"got {masks[name].shape}"
            )
    for name, layer in layers.items():
        layer.set_pattern(masks[name].to(layer.weight.device), adapter_name=spec.name)
    nnz = {name: masks[name].nnz for name in layers}
    attached(model).specs[spec.name] = replace(spec, nnz=nnz)
    set_requires_grad(model)


def adapter_targets(model: nn.Module, adapter_name: str | None = None) -> dict[str, RosaLinear]:
    """The layers of one adapter (the active one by default), by their names."""
    name = adapter_spec(model, adapter_name).name
    return {key: module for key, module in rosa_modules(model).items() if name in module.adapters}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, the oldest first."""
    return [*attached(model).specs]


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter in use, None while there is none or it is disabled."""
    return attached(model).active


def adapter_spec(model: nn.Module, adapter_name: str | None = None) -> AdapterSpec:
    """What an adapter (the active one by default) is.

    Raises:
        ValueError: there is none of that name, or none is active.
    """
    return attached(model).spec(adapter_name)


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make another adapter the active one, with its modules to save; only it trains.

    Raises:
        ValueError: no adapter of that name.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "set_adapter")
    activate(model, adapter_spec(model, adapter_name).name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model, exactly, for the length of a ``with`` block; nothing trains inside it.

    Raises:
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "disable_adapter")
    before = active_adapter(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    activate(model, None)
    try:
        yield
    finally:
        if before in adapter_names(model):
            activate(model, before)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter and free its tensors. If it was the active one, none is afterwards.

    Raises:
        ValueError: no adapter of that name.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "delete_adapter")
    name = adapter_spec(model, adapter_name).name
    if active_adapter(model) == name:
        activate(model, None)
    for layer in adapter_targets(model, name).values():
        layer.delete_adapter(name)
    record = attached(model)
    del record.specs[name]
    record.saved.pop(name, None)
    used = {key for spec in record.specs.values() for key in saved_parameters(model, spec)}
    record.base = {key: value for key, value in record.base.items() if key in used}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters that train, and of all of them, as PEFT counts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the line that PEFT prints."""
    trainable, total = trainable_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def param_groups(
    model: nn.Module,
    method: str | Method,
    *,
    lora_lr: float,
    sparse_lr: float,
    full_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The parameters that train, in groups for an optimizer.

    Each group has ``params``, ``lr``, ``weight_decay``, a ``name`` and ``peak_lr``, the learning
    rate that a schedule scales. The names are ``lora_a``, ``lora_b`` (whose rate is `lora_lr` times
    the method's ratio), ``sparse``, and ``full`` for the weights that train in full, whose vectors
    (biases, norms) are in ``full_no_decay``. Empty groups are left out.

    Raises:
        ValueError: nothing trains, or weights train in full and `full_lr` is None.
    """
    method = method_named(method)
    rates = {
        "lora_a": lora_lr,
        "lora_b": lora_lr * method.lr_b_ratio,
        "sparse": sparse_lr,
        "full": full_lr,
        "full_no_decay": full_lr,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    kinds = {
        id(parameter): {"lora_a": "lora_a", "lora_b": "lora_b", "values": "sparse"}[key]
        for layer in rosa_modules(model).values()
        for adapter in layer.adapters.values()
        for key, parameter in adapter.named_parameters()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            full = "full" if parameter.dim() > 1 else "full_no_decay"
            groups[kinds.get(id(parameter), full)].append(parameter)
    if not any(groups.values()):
        raise ValueError("param_groups: expected parameters that train, got none")
    if full_lr is None and (groups["full"] or groups["full_no_decay"]):
        raise ValueError("param_groups: expected a full_lr, as weights train in full, got None")
    return [
        {
            "params": params,
            "name": name,
            "lr": rates[name],
            "peak_lr": rates[name],
            "weight_decay": 0.0 if name == "full_no_decay" else weight_decay,
        }
        for name, params in groups.items()
        if params
    ]
