"""Attaches adapters to a model. Checks come first, and a failure is rolled back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.bounds import FRACTION_BELOW_1, POSITIVE
from rosa_kernels.masks.targets import (
    ALL_LINEAR,
    as_rule,
    check_pattern,
    check_without_peft,
    layer_shape,
    pattern_key,
    saved_modules,
    shared_weights,
    why_not_a_target,
)
from rosa_kernels.nn import RosaLinear
from rosa_kernels.nn.wrapped import get_module, named_modules, named_parameters
from rosa_train.adapters.state import (
    AdapterSpec,
    activate,
    adapter_state,
    check_not_merged,
    host_copy,
    put_modules,
    retie,
    rosa_modules,
    saved_parameters,
    set_requires_grad,
    untie,
)
from rosa_train.adapters.switch import adapter_names, adapter_spec, adapter_targets
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

    The model is changed in place: each target becomes a :class:`rosa_kernels.RosaLinear` that
    keeps its weight, bias and hooks. A is Kaiming-uniform like PEFT's. Its generator is seeded with
    `seed` and the module's name, so that A depends on no other module. B is zero. :func:`set_masks`
    adds the sparse branch later.

    With the method ``full`` no adapter is added, and every parameter of the model trains.

    Args:
        model: the model.
        method: a method or its name.
        allocation: the ranks and nonzeros of exactly these targets.
        targets: layers of the model, from :func:`find_targets`.
        alpha: the low-rank branch is scaled by alpha / rank.
        dropout: the dropout probability on the input of the low-rank branch, in [0, 1).
        alpha_pattern: another alpha for layers. Each key must match the end of a layer's name.
        adapter_name: the adapter's name, without dots.
        modules_to_save: names of modules that train in full. If their weights are tied to another
            module's, they get weights of their own, as in PEFT, until the adapter is removed.
        target_modules, exclude_modules: the rule to record in ``adapter_config.json``.
        seed: the seed of A.
        trainable: False for an adapter that is used and does not train.

    Raises:
        ValueError: the model has an adapter of that name. The targets are not layers of the model,
            cannot have an adapter (the message says why), or are not those of the allocation. A
            module to save is missing, is offloaded, or is a target too. A number is out of range.
            DistributedDataParallel wraps the model already, or it has an adapter of PEFT.
        RuntimeError: an adapter is merged.
    """
    method = method_named(method)
    if method.full:
        if adapter_names(model):
            raise ValueError(
                f"attach: expected a model without adapters for {method.name}, "
                f"got {adapter_names(model)}"
            )
        check_without_peft(model, "attach")
        model.requires_grad_(True)
        return
    alpha_pattern = alpha_pattern or {}
    check_pattern(alpha_pattern, targets, "alpha_pattern")
    alphas = {}
    for name in targets:
        key = pattern_key(alpha_pattern, name)
        given = alpha if key is None else alpha_pattern[key]
        alphas[name] = float(POSITIVE.check("attach", given, f"alpha of {name}"))
    spec = AdapterSpec(
        name=adapter_name,
        method=method,
        ranks=dict(allocation.ranks),
        alphas=alphas,
        nnz=dict(allocation.nnz),
        dropout=float(FRACTION_BELOW_1.check("attach", dropout, "dropout")),
        target_modules=as_rule(target_modules),
        exclude_modules=as_rule(exclude_modules) if exclude_modules else None,
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
    """Give an adapter its sparse branch: a mask for each of its layers, with values of zero.

    The values are new Parameters, which must be given to the optimizer.

    Raises:
        ValueError: the method has no sparse branch, or the masks are not those of the adapter's
            layers, or a shape differs. DistributedDataParallel wraps the model already, or a weight
            is on the meta device. Nothing is changed then.
        RuntimeError: an adapter is merged.
    """
    check_not_merged(model, "set_masks")
    _check_not_distributed(model, "set_masks")
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
        if layer.weight.is_meta:
            raise ValueError(
                f"set_masks: expected weights with data, got {name} on the meta device; set masks "
                "before accelerate offloads it"
            )
        if masks[name].shape != layer_shape(layer):
            raise ValueError(
                f"set_masks: expected a mask of shape {layer_shape(layer)} for {name}, "
                f"got {masks[name].shape}"
            )
    for name, layer in layers.items():
        layer.set_pattern(masks[name].to(layer.weight.device), adapter_name=spec.name)
    nnz = {name: masks[name].nnz for name in layers}
    adapter_state(model).specs[spec.name] = replace(spec, nnz=nnz)
    set_requires_grad(model)


def install(model: nn.Module, spec: AdapterSpec, targets: Mapping[str, nn.Module]) -> None:
    """Add the adapter of a spec, with its initial values, and make it the active one.

    Raises the errors of :func:`attach`. The model is then unchanged.
    """
    check_installable(model, spec, targets)
    state = adapter_state(model)
    trained = {name: p for name, p in named_parameters(model) if p.requires_grad}
    replaced: dict[str, RosaLinear] = {}
    added: list[RosaLinear] = []
    try:
        # A's first values come from the global generator. An adapter must not change its state.
        with torch.random.fork_rng(devices=[]):
            for name, layer in targets.items():
                options: dict[str, Any] = {
                    "rank": spec.ranks[name],
                    "alpha": spec.alphas[name],
                    "dropout": spec.dropout,
                    "train_a": spec.method.train_a,
                }
                if isinstance(layer, RosaLinear):
                    layer.add_adapter(spec.name, **options)
                    added.append(layer)
                else:
                    replaced[name] = RosaLinear(layer)
                    replaced[name].add_adapter(spec.name, **options)
        untie(model, spec)
    except BaseException:
        for layer in added:
            layer.delete_adapter(spec.name)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if not state.specs:
            retie(model)
        raise
    put_modules(model, replaced)
    if state.trained_before is None:
        state.trained_before = frozenset(trained)
    if not state.specs:
        model.requires_grad_(False)
    for name, parameter in saved_parameters(model, spec).items():
        state.base.setdefault(name, host_copy(parameter))
    state.specs[spec.name] = spec
    activate(model, spec.name)


def check_installable(
    model: nn.Module, spec: AdapterSpec, targets: Mapping[str, nn.Module]
) -> None:
    """Raise the errors of :func:`attach` for a spec that does not fit the model."""
    check_not_merged(model, "attach")
    check_without_peft(model, "attach")
    if spec.trainable:
        _check_not_distributed(model, "attach")
    if not spec.name or "." in spec.name:
        raise ValueError(f"attach: expected an adapter name without dots, got {spec.name!r}")
    if spec.name in adapter_state(model).specs:
        raise ValueError(
            f"attach: expected a new adapter name, got {spec.name!r}, which is attached already; "
            "delete it or choose another name"
        )
    if not targets:
        raise ValueError("attach: expected target layers, got none")
    for what, given in (("ranks", spec.ranks), ("nnz", spec.nnz)):
        if set(given) != set(targets):
            odd = sorted(set(given) ^ set(targets))
            raise ValueError(
                f"attach: expected {what} of exactly the {len(targets)} targets, got {len(given)}, "
                f"differing in {', '.join(odd[:5])}"
            )
    modules = dict(named_modules(model))
    shared = shared_weights(model)
    for name, layer in targets.items():
        if modules.get(name) is not layer:
            raise ValueError(
                f"attach: expected layers of this model, got {type(layer).__name__} as {name!r}"
            )
        reason = why_not_a_target(model, name)
        if reason:
            raise ValueError(
                f"attach: expected plain modules of class Linear or Conv1D, got {name} {reason}"
            )
        if name in shared:
            raise ValueError(
                f"attach: expected weights that share memory with no other tensor, got {name}, "
                f"which is tied to {shared[name]}"
            )
    adapted = {*targets, *rosa_modules(model)}
    specs = (spec, *adapter_state(model).specs.values())
    for module in (saved for spec in specs for saved in spec.modules_to_save):
        inside = [name for name in adapted if f"{name}.".startswith(f"{module}.")]
        if inside:
            raise ValueError(
                f"modules_to_save: expected modules without adapters, got {module} and an adapter "
                f"in {inside[0]}"
            )
    for module in spec.modules_to_save:
        if any(parameter.is_meta for parameter in get_module(model, module).parameters()):
            raise ValueError(
                f"modules_to_save: expected weights with data, got {module} on the meta device; "
                "attach before accelerate offloads it"
            )


def _check_not_distributed(model: nn.Module, op: str) -> None:
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            f"{op}: expected a model that DistributedDataParallel does not wrap yet, because it "
            "would not average the new parameters' gradients; wrap it afterwards"
        )


def init_lora_a_(lora_a: Tensor, name: str, seed: int) -> None:
    """Fill A as PEFT does, uniform in +-1/sqrt(n) (Kaiming with a = sqrt(5)).

    The generator is seeded with `seed` and the layer's name.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # The numbers are drawn on the host, so that they are the same on every device.
    drawn = torch.empty(lora_a.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        lora_a.copy_(drawn)
