"""PEFT's tuners with the same initial numbers as ours: LoRA, Super-Tuning, SHiRA.

They are injected into the model without the PeftModel wrapper, which costs each forward about 20
us. Their masks are given in row-major order. This uses the cache better than PEFT's own order, by
magnitude.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import Adapted
from .parametrization import ALPHA, Parametrization

_NAME = "default"


def missing(package: str) -> str | None:
    """The reason why a package cannot be used, or None."""
    try:
        found = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    return None if found else f"{package} is not installed"


def lora(root: nn.Module, parametrizations: dict[str, Parametrization], dropout: float) -> Adapted:
    """`peft.LoraConfig`."""
    from peft import LoraConfig

    rank = _one(parametrization.rank for parametrization in parametrizations.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=int(ALPHA),
        lora_dropout=dropout,
        target_modules=list(parametrizations),
        bias="none",
    )

    def parts(layer: Any) -> dict[str, nn.Parameter]:
        return {"a": layer.lora_A[_NAME].weight, "b": layer.lora_B[_NAME].weight}

    return _inject(root, parametrizations, config, parts, _dropping(dropout))


def super_tuning(
    root: nn.Module, parametrizations: dict[str, Parametrization], dropout: float
) -> Adapted:
    """`peft.SupertuningConfig`: sparse only, or "Supra" with a low-rank branch.

    It is "Supra" if the parametrizations have a rank.
    """
    from peft import SupertuningConfig

    low_rank: dict[str, Any] = {}
    ranks = {parametrization.rank for parametrization in parametrizations.values()}
    if ranks != {0}:
        low_rank = {"r": _one(ranks), "lora_alpha": ALPHA, "lora_dropout": dropout}
    # The sparsity does not matter: the support is replaced below, because the config cannot set it.
    config = SupertuningConfig(target_modules=list(parametrizations), sparsity=0.9, **low_rank)

    def parts(layer: Any) -> dict[str, nn.Parameter]:
        found = {"values": layer.supertuning_values[_NAME]}
        if low_rank:
            found["a"] = layer.supertuning_lora_A[_NAME].weight
            found["b"] = layer.supertuning_lora_B[_NAME].weight
        return found

    adapted = _inject(root, parametrizations, config, parts, _dropping(dropout))
    for name, parametrization in parametrizations.items():
        layer: Any = adapted.module.get_submodule(name)
        layer.supertuning_indices[_NAME] = _flat(parametrization).int()
    return adapted


def shira(root: nn.Module, parametrizations: dict[str, Parametrization], dropout: float) -> Adapted:
    """`peft.ShiraConfig`, whose masks have r (m + n) entries."""
    from peft import ShiraConfig

    masks = {}
    for name, parametrization in parametrizations.items():
        assert parametrization.pattern is not None
        masks[name] = parametrization.pattern
    ranks = {p.nnz // sum(p.shape) for p in masks.values()}
    config: Any = ShiraConfig(r=_one(ranks), target_modules=list(parametrizations))
    by_layer = {id(root.get_submodule(name)): pattern for name, pattern in masks.items()}

    def mask_of(layer: nn.Module, r: int, **options: Any) -> Tensor:
        pattern = by_layer[id(layer)]
        mask = torch.zeros(pattern.shape, device=pattern.device)
        mask[pattern.row_indices.long(), pattern.col_indices.long()] = 1
        return mask

    config.mask_fn = mask_of
    adapted = _inject(
        root, parametrizations, config, lambda layer: {"values": layer.shira_weight[_NAME]}
    )
    config.mask_fn = None  # else the model would keep our masks besides its indices
    return adapted


def _inject(
    root: nn.Module,
    parametrizations: dict[str, Parametrization],
    config: Any,
    parts: Callable[[Any], dict[str, nn.Parameter]],
    keeps: Callable[[str, Tensor], Tensor] | None = None,
) -> Adapted:
    import peft

    root = peft.inject_adapter_in_model(config, root)
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, parametrization in parametrizations.items():
        found = parts(root.get_submodule(name))
        trained[name] = {part: found[part] for part in parametrization.trains}
        # float32 masters, as PEFT itself makes them for a 16-bit model.
        parametrization.initialize(trained[name])
        for parameter in trained[name].values():
            parameter.requires_grad_()
    return Adapted(root, trained, keeps=keeps)


def _dropping(dropout: float) -> Callable[[str, Tensor], Tensor] | None:
    if not dropout:
        return None
    return lambda name, x: nn.functional.dropout(torch.ones_like(x), dropout) != 0


def _flat(parametrization: Parametrization) -> Tensor:
    assert parametrization.pattern is not None
    rows, cols = (
        parametrization.pattern.row_indices.long(),
        parametrization.pattern.col_indices.long(),
    )
    return rows * parametrization.pattern.shape[1] + cols


def _one(found: Any) -> int:
    (rank,) = set(found)
    return int(rank)
