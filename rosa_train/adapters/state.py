"""What a model with adapters knows of them, and how one of them becomes the active one."""

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
    """What an adapter is, less its tensors.

    Attributes:
        name: the adapter's name.
        method: its method.
        ranks, alphas, nnz: of each layer that has the adapter, by module name; nnz as allocated
            until there is a mask, then the mask's.
        dropout: on the input of the low-rank branch.
        target_modules, exclude_modules: the rule that chose the layers.
        modules_to_save: names of the modules that train in full.
        trainable: whether its parameters train while it is active.
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

    A module to save is one module for all adapters: its parameters hold the values of the active
    one, `base` those they had at first, and `saved` those of the adapters that are not active, both
    on the host. So switching is exact, costs no device memory, and an optimizer's parameters stay
    the same objects.

    Attributes:
        specs: every adapter by its name, the oldest first.
        active: the name of the one in use.
        trained_before: the names of the parameters that trained before the first adapter; None
            before there is one.
        base: values of parameters of modules to save, without any adapter.
        saved: the same under each adapter that is not active.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    active: str | None = None
    trained_before: frozenset[str] | None = None
    base: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def spec(self, name: str | None) -> AdapterSpec:
        """The spec of an adapter, the active one for None."""
        if name is None:
            name = self.active
        if name is None:
            raise ValueError(f"adapter: expected an active adapter, got none of {[*self.specs]}")
        if name not in self.specs:
            raise ValueError(f"adapter: expected one of {[*self.specs]}, got {name!r}")
        return self.specs[name]


def adapter_state(model: nn.Module) -> AdapterState:
    """The state of a model's adapters, an empty one if it never had any."""
    state = getattr(model, _ATTRIBUTE, None)
    if state is None:
        state = AdapterState()
        setattr(model, _ATTRIBUTE, state)
    return state


def forget(model: nn.Module) -> None:
    """Drop the state of a model that has no adapters any more."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def rosa_modules(model: nn.Module) -> dict[str, RosaLinear]:
    """Every layer that has been given an adapter, by its name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RosaLinear)}


def saved_parameters(model: nn.Module, spec: AdapterSpec | None) -> dict[str, nn.Parameter]:
    """The parameters of an adapter's modules to save, by the name that ``named_parameters`` uses.

    A parameter of two modules (a tied head) is there once, under one name.
    """
    wanted = {
        id(parameter)
        for module in (spec.modules_to_save if spec is not None else ())
        for parameter in model.get_submodule(module).parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) in wanted} if wanted else {}


def activate(model: nn.Module, name: str | None) -> None:
    """Make an adapter, or none, the one in use: its branches, saved modules and requires_grad."""
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
    """Let the active adapter's parameters train, if its spec says so, and no others."""
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
