"""The state of a model's adapters, and the switch from one active adapter to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import ALL_LINEAR
from rosa_kernels.nn import RosaLinear
from rosa_kernels.nn.wrapped import (
    get_module,
    named_modules,
    named_parameters,
    set_module,
    shared_tensors,
    unwrapped,
)
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
        untied: the names of parameters that :func:`untie` has replaced, each with the name of the
            same parameter elsewhere.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    active: str | None = None
    trained_before: frozenset[str] | None = None
    base: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)

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
    model = unwrapped(model)
    state = getattr(model, _ATTRIBUTE, None)
    if state is None:
        state = AdapterState()
        setattr(model, _ATTRIBUTE, state)
    return state


def forget(model: nn.Module) -> None:
    """Delete the adapter state of a model whose adapters are removed."""
    model = unwrapped(model)
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def rosa_modules(model: nn.Module) -> dict[str, RosaLinear]:
    """Every RosaLinear of a model by its name, in the model's order."""
    return {name: m for name, m in named_modules(model) if isinstance(m, RosaLinear)}


def put_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Replace modules of a model by their names, everywhere: a module may have several names."""
    names: dict[int, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    old = {name: get_module(model, name) for name in new}
    for name, module in new.items():
        for place in names[id(old[name])]:
            set_module(model, place, module)


def saved_parameters(model: nn.Module, spec: AdapterSpec | None) -> dict[str, nn.Parameter]:
    """The parameters of an adapter's modules to save, by the names of ``named_parameters``."""
    wanted = {
        id(parameter)
        for module in (spec.modules_to_save if spec is not None else ())
        for parameter in get_module(model, module).parameters()
    }
    return {name: p for name, p in named_parameters(model) if id(p) in wanted} if wanted else {}


def untie(model: nn.Module, spec: AdapterSpec) -> None:
    """Give an adapter's modules to save parameters of their own, with equal values, as PEFT does.

    Training them, or loading an adapter of PEFT, then changes no tensor outside the module.
    """
    for saved in spec.modules_to_save:
        inside = f"{saved}."
        copies: dict[int, nn.Parameter] = {}
        for name, others in shared_tensors(model).items():
            outside = [other for other in others if not other.startswith(inside)]
            old = _tensors_at(model, name).get(name.rpartition(".")[2])
            if not name.startswith(inside) or not outside or old is None:
                continue
            if id(old) not in copies:
                copies[id(old)] = nn.Parameter(old.detach().clone(), old.requires_grad)
            _tensors_at(model, name)[name.rpartition(".")[2]] = copies[id(old)]
            for other in outside:
                if _tensors_at(model, other).get(other.rpartition(".")[2]) is old:
                    adapter_state(model).untied[name] = other


def retie(model: nn.Module) -> None:
    """Undo :func:`untie`. The modules must have their values without any adapter."""
    untied = adapter_state(model).untied
    while untied:
        name, other = untied.popitem()  # the latest first: its partner may be untied, too
        partner = _tensors_at(model, other)[other.rpartition(".")[2]]
        _tensors_at(model, name)[name.rpartition(".")[2]] = partner


def _tensors_at(model: nn.Module, name: str) -> dict[str, nn.Parameter | None]:
    """The parameters of the module that holds the tensor of that name."""
    return get_module(model, name.rpartition(".")[0])._parameters


def activate(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, or none: its branches, saved modules and requires_grad."""
    state = adapter_state(model)
    if state.active != name:
        before = saved_parameters(model, state.specs.get(state.active or ""))
        after = saved_parameters(model, state.specs.get(name or ""))
        offloaded = [key for key, parameter in (before | after).items() if parameter.is_meta]
        if offloaded:
            raise RuntimeError(
                f"adapter: expected modules to save with data, got {offloaded[0]} on the meta "
                "device; remove accelerate's hooks first"
            )
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
