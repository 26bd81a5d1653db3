"""Lists, switches, disables and deletes a model's adapters, and counts what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rosa_kernels.nn import RosaLinear
from rosa_train.adapters.state import (
    AdapterSpec,
    activate,
    adapter_state,
    check_not_merged,
    retie,
    rosa_modules,
    saved_parameters,
)


def adapter_targets(model: nn.Module, adapter_name: str | None = None) -> dict[str, RosaLinear]:
    """The layers of one adapter (the active one by default), by their names."""
    name = adapter_spec(model, adapter_name).name
    return {key: module for key, module in rosa_modules(model).items() if name in module.adapters}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, the oldest first."""
    return [*adapter_state(model).specs]


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter. None means that there is none, or it is disabled."""
    return adapter_state(model).active


def adapter_spec(model: nn.Module, adapter_name: str | None = None) -> AdapterSpec:
    """The description of an adapter, by default the active one.

    Raises:
        ValueError: there is no adapter of that name, or no adapter is active.
    """
    return adapter_state(model).spec(adapter_name)


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make another adapter the active one, with its modules to save. Only that adapter trains.

    Raises:
        ValueError: there is no adapter of that name.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "set_adapter")
    activate(model, adapter_spec(model, adapter_name).name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Restore the exact base model for a ``with`` block, inside which no adapter trains.

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
    """Remove an adapter and free its tensors. If it was active, no adapter is active afterwards.

    Raises:
        ValueError: there is no adapter of that name.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "delete_adapter")
    name = adapter_spec(model, adapter_name).name
    if active_adapter(model) == name:
        activate(model, None)
    for layer in adapter_targets(model, name).values():
        layer.delete_adapter(name)
    state = adapter_state(model)
    del state.specs[name]
    state.saved.pop(name, None)
    used = {key for spec in state.specs.values() for key in saved_parameters(model, spec)}
    state.base = {key: value for key, value in state.base.items() if key in used}
    if not used:
        retie(model)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of parameters that train, and of all parameters, as PEFT counts them."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the line that PEFT prints."""
    trainable, total = trainable_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
