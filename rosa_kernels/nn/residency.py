"""Residency: S is inside the weight during training, so forward and backward cost nothing more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rosa_kernels.nn.linear import RESIDENT, SCATTER, SEPARATE, RosaLinear


class Residency:
    """The result of :func:`make_resident`: where each layer's S is, and how to take S out again.

    Attributes:
        paths: layer name -> "resident", or "scatter: reason", or "separate: reason".
    """

    def __init__(self, layers: dict[str, RosaLinear], paths: dict[str, str], hook: Any) -> None:
        self.paths = paths
        self._layers = layers
        self._hook = hook

    def remove(self) -> None:
        """Restore W in every weight, bit by bit, and remove the optimizer's hook."""
        self._hook.remove()
        for layer in self._layers.values():
            layer.leave_residency()


def make_resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> Residency:
    """Write the active adapters' S into their weights, and again after each step of `optimizer`.

    Formula: weight[idx] = round(W[idx] + values).

    The weight is derived from the float32 `values` and never read back: steps of 2e-5 inside a
    bfloat16 weight lose 69 % of the movement. The originals W[idx] are kept, which are nnz elements
    in the weight's dtype.

    Adapters and patterns that are set later become resident too. Call :func:`sync` if anything
    but this optimizer or the model's load_state_dict has changed `values`. Code that reads
    parameters outside the state_dict (an AveragedModel) or replaces them
    (torch.func.functional_call) sees W + S. Run such code inside :func:`base_weights`.

    Weights that other modules share, or that cannot be written to, are left as they are: see
    `paths` of the result.

    Raises:
        RuntimeError: FSDP has sharded weights, so that no layer has a whole one.
        ValueError: `optimizer` lacks some trainable values; their weights would not be updated.
    """
    layers = _layers(model)
    # accelerate wraps optimizers. Hooks of the inner one also run if the wrapper is stepped.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    sharded = [n for n, layer in layers.items() if getattr(layer, "_is_fsdp_managed_module", False)]
    if sharded:
        raise RuntimeError(
            f"make_resident: expected weights that are whole, got {len(sharded)} sharded by FSDP "
            f"({sharded[0]} ...); without make_resident they take the separate path"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        values = layer.adapter().values if layer.active_adapter else None
        if values is not None and values.requires_grad and id(values) not in held:
            raise ValueError(
                f"make_resident: expected an optimizer that holds the values of {name}, got one "
                "that does not"
            )

    def after_step(*_: Any) -> None:
        for layer in layers.values():
            layer.sync()

    # The hook is registered before any S is written. So whatever fails here, a hook syncs every S
    # that is in a weight.
    hook = optimizer.register_step_post_hook(after_step)
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    paths = {}
    for name, layer in layers.items():
        path, reason = layer.path()
        if path != SEPARATE and users[id(layer.weight)] > 1:
            path, reason = SCATTER, "another module shares the weight"
        elif path != SEPARATE:
            layer._may_reside = True
            layer._insert_sparse()
            path, reason = RESIDENT, ""
        paths[name] = f"{path}: {reason}" if reason else path
    return Residency(layers, paths, hook)


def sync(model: nn.Module) -> None:
    """Write resident weights again, after anything but the optimizer has changed `values`."""
    for layer in _layers(model).values():
        layer.sync()


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """A context in which every weight holds W, without a copy. Use it to save the original model.

    Raises:
        RuntimeError: an adapter is merged; call unmerge first.
    """
    layers = _layers(model).values()
    for layer in layers:
        layer._refuse_while_merged("base_weights")
    # Inside another base_weights this list is empty: the outer one inserts S again at its end.
    parked = [layer for layer in layers if layer._resident is not None]
    for layer in parked:
        layer._restore_weight()
    try:
        yield
    finally:
        for layer in parked:
            layer._insert_sparse()


def _layers(model: nn.Module) -> dict[str, RosaLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, RosaLinear)}
