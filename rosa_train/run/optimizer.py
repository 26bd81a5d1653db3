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

    Each group has ``params``, ``lr``, ``weight_decay``, a ``name``, and ``peak_lr``, which is the
    learning rate that a schedule scales. The groups are:

        lora_a           A, at `lora_lr`
        lora_b           B, at `lora_lr` times the method's ratio
        sparse           the values of S, at `sparse_lr`
        full             matrices that train in full, at `full_lr`
        full_no_decay    vectors that train in full (biases, norms), at `full_lr`

    Empty groups are left out.

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
        raise ValueError(
            "param_groups: expected a full_lr for weights that train in full, got None"
        )
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
    """AdamW on the parameters that train now."""
    # SpA has nothing to train until its masks are chosen.
    waiting = not any(p.requires_grad for p in model.parameters())
    groups = [{"params": [], "name": "none", "peak_lr": 0.0}]
    return torch.optim.AdamW(
        groups if waiting else _groups(model, method, args),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,  # one pass over the moments; on a CPU the other kernels make a dozen
    )


def add_new_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, method: Method, args: TrainArguments
) -> None:
    """Adds the parameters that train since the masks were chosen."""
    known = {group["name"] for group in optimizer.param_groups}
    for group in _groups(model, method, args):
        if group["name"] not in known:  # the known groups keep Adam's state
            optimizer.add_param_group(group)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, sorted by name.

    A resumed run may hold them in another order. The sum of their norms would then differ.
    """
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates to log.

    `learning_rate` is that of the low-rank branch, or of what trains if there is none.
    """
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    names = ("lora_a", "lora_b", "sparse", "full", "full_no_decay")
    found = {"learning_rate": next(rates[name] for name in names if name in rates)}
    if "sparse" in rates:
        found["sparse_learning_rate"] = rates["sparse"]
    return found


def _groups(model: nn.Module, method: Method, args: TrainArguments) -> list[dict[str, Any]]:
    given = args.sparse_learning_rate
    return param_groups(
        model,
        method,
        lora_lr=args.learning_rate,
        sparse_lr=method.sparse_lr if given is None else given,
        full_lr=args.full_learning_rate,
        weight_decay=args.weight_decay,
    )
