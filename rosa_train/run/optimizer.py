"""The parameters that train, in groups for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from rosa_train.adapters.state import rosa_modules
from rosa_train.methods.method import Method, method_named


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
