"""An adapter put into a model: all is checked first, and what fails is taken back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import is_layer
from rosa_kernels.nn import RosaLinear
from rosa_train.adapters.state import (
    AdapterSpec,
    activate,
    attached,
    check_not_merged,
    host_copy,
    rosa_modules,
    saved_parameters,
)


def install(model: nn.Module, spec: AdapterSpec, targets: Mapping[str, nn.Module]) -> None:
    """Add the adapter of a spec, with the values it is born with, and make it the active one.

    Raises what :func:`attach` does, and leaves the model as it was then.
    """
    check_installable(model, spec, targets)
    record = attached(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    replaced: dict[str, RosaLinear] = {}
    added: list[RosaLinear] = []
    try:
        # A's first values come from the global generator, whose state is none of an adapter's.
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
    except BaseException:
        for layer in added:
            layer.delete_adapter(spec.name)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        raise
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    if record.trained_before is None:
        record.trained_before = frozenset(trained)
    if not record.specs:
        model.requires_grad_(False)
    for name, parameter in saved_parameters(model, spec).items():
        record.base.setdefault(name, host_copy(parameter))
    record.specs[spec.name] = spec
    activate(model, spec.name)


def check_installable(
    model: nn.Module, spec: AdapterSpec, targets: Mapping[str, nn.Module]
) -> None:
    """Raise what :func:`attach` raises for a spec that the model cannot take."""
    check_not_merged(model, "attach")
    if not spec.name or "." in spec.name:
        raise ValueError(f"attach: expected an adapter name without dots, got {spec.name!r}")
    if spec.name in attached(model).specs:
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
    modules = dict(model.named_modules())
    for name, layer in targets.items():
        if not is_layer(layer) or modules.get(name) is not layer:
            raise ValueError(
                f"attach: expected layers of this model, got {type(layer).__name__} as {name!r}"
            )
    if not 0 <= spec.dropout < 1:
        raise ValueError(f"attach: expected dropout in [0, 1), got {spec.dropout}")
    for name, alpha in spec.alphas.items():
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"attach: expected a positive alpha, got {alpha} for {name}")
    adapted = {*targets, *rosa_modules(model)}
    specs = (spec, *attached(model).specs.values())
    for module in (saved for spec in specs for saved in spec.modules_to_save):
        inside = [name for name in adapted if f"{name}.".startswith(f"{module}.")]
        if inside:
            raise ValueError(
                f"modules_to_save: expected modules without adapters, got {module} and an adapter "
                f"in {inside[0]}"
            )


def init_lora_a_(lora_a: Tensor, name: str, seed: int) -> None:
    """Fill A as PEFT does, uniform in +-1/sqrt(n) (Kaiming with a = sqrt(5)), seeded by name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Drawn on the host: the same numbers whatever the device.
    drawn = torch.empty(lora_a.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        lora_a.copy_(drawn)
