"""The state of a model's adapters, and the switch from one active adapter to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import ALL_LINEAR
from rosa_kernels.nn import RosaLinear
from rosa_train.methods.method import Method

_ATTRIBUTE = "_rosa_adapter_state"


@dataclass(frozen=True)
class AdapterSpec:
    """The description of an adapter, without its tensors.

    Attributes:
        name: the adapter's name.
        method: the adapter's method.
        ranks, alphas, nnz: a number for each layer with the adapter, by module name. `nnz` is the
            allocation until there is a mask, and then the mask's number of nonzeros.
        dropout: the dropout probability on the input of the low-rank branch.
        target_modules, exclude_modules: the rule that chose the layers.
        modules_to_save: names of the modules that train in full.
        trainable: whether the adapter's parameters train while it is active.
    """

    name: str
    method: Method
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    nnz: Mapping[str, int]
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: tuple[str, ...] = ()
    trainable: bool = True


@dataclass
class AdapterState:
    """The adapters of one model, kept on the model.

    All adapters share one copy of a module to save. Its parameters hold the active adapter's
    values. `base` holds the values without any adapter, and `saved` those of inactive adapters,
    both on the host. So a switch is exact and needs no device memory, and an optimizer's
    parameters stay the same objects.

    Attributes:
        specs: every adapter by its name, the oldest first.
        active: the name of the active adapter, or None.
        trained_before: the names of the parameters that trained before the first adapter, or None
            if there was no adapter yet.
        base: values of the parameters of modules to save, without any adapter.
        saved: values of the same parameters for each inactive adapter.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    active: str | None = None
    trained_before: frozenset[str] | None = None
    base: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def spec(self, name: str | None) -> AdapterSpec:
        """The spec of an adapter. None stands for the active adapter."""
        if name is None:
            name = self.active
        if name is None:
            raise ValueError(f"adapter: expected an active adapter, got none of {[*self.specs]}")
        if name not in self.specs:
            raise ValueError(f"adapter: expected one of {[*self.specs]}, got {name!r}")
        return self.specs[name]


def adapter_state(model: nn.Module) -> AdapterState:
    """The state of a model's adapters. It is empty if the model never had an adapter."""
    state = getattr(model, _ATTRIBUTE, None)
    if state is None:
        state = AdapterState()
        setattr(model, _ATTRIBUTE, state)
    return state


def forget(model: nn.Module) -> None:
    """Delete the adapter state of a model whose adapters are removed."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def rosa_modules(model: nn.Module) -> dict[str, RosaLinear]:
    """Every RosaLinear of a model by its name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RosaLinear)}


def put_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Replace modules of a model by their names, everywhere: a module may have several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    old = {name: model.get_submodule(name) for name in new}
    for name, module in new.items():
        for place in names[id(old[name])]:
            model.set_submodule(place, module)


def saved_parameters(model: nn.Module, spec: AdapterSpec | None) -> dict[str, nn.Parameter]:
    """The parameters of an adapter's modules to save, by the names of ``named_parameters``.

    A parameter that two modules share, such as a tied head's, appears once, under one name.
    """
    wanted = {
        id(parameter)
        for module in (spec.modules_to_save if spec is not None else ())
        for parameter in model.get_submodule(module).parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) in wanted} if wanted else {}


def activate(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, or none: its branches, saved modules and requires_grad."""
    state = adapter_state(model)
    if state.active != name:
        before = saved_parameters(model, state.specs.get(state.active or ""))
        after = saved_parameters(model, state.specs.get(name or ""))
        if state.active is not None and before:
            state.saved[state.active] = {key: host_copy(p) for key, p in before.items()}
        values = state.base | state.saved.pop(name or "", {})
        with torch.no_grad():
            for key, parameter in (before | after).items():
                parameter.copy_(values[key])
        state.active = name
    for layer in rosa_modules(model).values():
        layer.set_adapter(name if name is not None and name in layer.adapters else None)
    set_requires_grad(model)


def set_requires_grad(model: nn.Module) -> None:
    """Let only the active adapter's parameters train, and only if its spec says so."""
    state = adapter_state(model)
    for layer in rosa_modules(model).values():
        for name, adapter in layer.adapters.items():
            spec = state.specs[name]
            trains = spec.trainable and name == state.active
            for key, parameter in adapter.named_parameters():
                parameter.requires_grad_(trains and (key != "lora_a" or spec.method.trains_a))
    for spec in state.specs.values():
        for parameter in saved_parameters(model, spec).values():
            parameter.requires_grad_(False)
    active = state.specs.get(state.active or "")
    for parameter in saved_parameters(model, active).values():
        parameter.requires_grad_(active is not None and active.trainable)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the host."""
    return tensor.detach().to("cpu", copy=True)


def check_not_merged(model: nn.Module, op: str) -> None:
    """Raise RuntimeError if an adapter is merged into the weights."""
    merged = next((m.merged for m in rosa_modules(model).values() if m.merged is not None), None)
    if merged is not None:
        raise RuntimeError(
            f"{op}: expected no merged adapter, got {merged!r} merged; unmerge first"
        )
