"""The parameters that train, their optimizer, and its learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rosa_train.adapters.state import rosa_modules
from rosa_train.config import TrainArguments
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


def make_adamw(model: nn.Module, method: Method, args: TrainArguments) -> torch.optim.AdamW:
    """AdamW on what trains now."""
    # SpA has nothing to train until its masks are there.
    waiting = not any(p.requires_grad for p in model.parameters())
    groups = [{"params": [], "name": "none", "peak_lr": 0.0}]
    return torch.optim.AdamW(
        groups if waiting else _groups(model, method, args),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,  # one pass over the moments; the others make a dozen on a CPU
    )


def add_new_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, method: Method, args: TrainArguments
) -> None:
    """Tells the optimizer of what trains since the masks are there."""
    known = {group["name"] for group in optimizer.param_groups}
    for group in _groups(model, method, args):
        if group["name"] not in known:  # Adam's state of the low-rank branch stays
            optimizer.add_param_group(group)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """By name: a resumed run may hold them in another order, and a sum of norms would differ."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`learning_rate` is the low-rank branch's, or of what trains instead of it."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    names = ("lora_a", "lora_b", "sparse", "full", "full_no_decay")
    found = {"learning_rate": next(rates[name] for name in names if name in rates)}
    if "sparse" in rates:
        found["sparse_learning_rate"] = rates["sparse"]
    return found


def _groups(model: nn.Module, method: Method, args: TrainArguments) -> list[dict[str, Any]]:
    return param_groups(
        model,
        method,
        lora_lr=args.learning_rate,
        sparse_lr=args.sparse_learning_rate,
        full_lr=args.full_learning_rate,
        weight_decay=args.weight_decay,
    )
