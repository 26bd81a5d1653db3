"""Residency: S is inside the weight during training, so forward and backward cost nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rosa_kernels.nn.linear import RESIDENT, SCATTER, SEPARATE, RosaLinear
from rosa_kernels.nn.wrapped import named_modules, shared_tensors


class Residency:
    """The result of :func:`make_resident`: where each layer's S is, and how to take S out again.

    Attributes:
        paths: layer name -> "resident", or "scatter: reason", or "separate: reason".
    """

    def __init__(
        self, layers: dict[str, RosaLinear], paths: dict[str, str], hooks: Sequence[Any]
    ) -> None:
        self.paths = paths
        self._layers = layers
        self._hooks = hooks

    def remove(self) -> None:
        """Restore W in every weight, bit by bit, and remove the optimizer's hooks."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            layer.leave_residency()


def make_resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> Residency:
    """Write the active adapters' S into their weights, and again when `optimizer` changes `values`.

    Formula: weight[idx] = round(W[idx] + values).

    The weight is derived from the float32 `values` and never read back: steps of 2e-5 inside a
    bfloat16 weight lose 69 % of the movement. The originals W[idx] are kept, which are nnz elements
    in the weight's dtype.

    S is written after each step, and before each evaluation of a closure that step was given
    (torch.optim.LBFGS). A forward in eager mode also notices in-place changes of `values`. Call
    :func:`sync` after all other changes: of ``values.data``, and outside step under torch.compile.

    Adapters and patterns that are set later become resident too. Code that reads parameters outside
    the state_dict (an AveragedModel) or replaces them (torch.func.functional_call) sees W + S. Run
    such code inside :func:`base_weights`.

    Weights that share memory with another parameter or buffer of `model` (tied weights), or that
    cannot be written to, are left as they are: see `paths` of the result. So give the whole model.

    Args:
        model: a model with RosaLinear layers, or one such layer.
        optimizer: a torch.optim.Optimizer, or a wrapper with one as its `optimizer`, as
            accelerate's.

    Raises:
        TypeError: `model` is not a module, or `optimizer` has no hooks for its steps.
        RuntimeError: FSDP has sharded weights, so that no layer has a whole one.
        ValueError: `optimizer` lacks some trainable values; their weights would not be updated.
    """
    layers = _layers(model, "make_resident")
    stepping = _with_step_hooks(optimizer)
    if not stepping:
        raise TypeError(
            "make_resident: expected a torch.optim.Optimizer, or a wrapper with one as its "
            f"`optimizer`, got {type(optimizer).__name__}"
        )
    sharded = [n for n, layer in layers.items() if getattr(layer, "_is_fsdp_managed_module", False)]
    if sharded:
        raise RuntimeError(
            f"make_resident: expected weights that are whole, got {len(sharded)} sharded by FSDP "
            f"({sharded[0]} ...); without make_resident they take the separate path"
        )
    held = {id(p) for o in stepping for group in o.param_groups for p in group["params"]}
    for name, layer in layers.items():
        values = layer.adapter().values if layer.active_adapter else None
        if values is not None and values.requires_grad and id(values) not in held:
            raise ValueError(
                f"make_resident: expected an optimizer that holds the values of {name}, got one "
                "that does not"
            )

    def write(*_: Any) -> None:
        for layer in layers.values():
            layer.sync()

    def before_step(_: Any, args: Any, kwargs: Any) -> Any:
        def following(closure: Callable[[], Any]) -> Callable[[], Any]:
            def evaluate() -> Any:
                write()
                return closure()

            return evaluate

        # step(closure): the first of `args` is the optimizer.
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": following(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], following(args[1]), *args[2:]), kwargs
        return None

    # The hooks are registered before any S is written. So whatever fails here, a hook syncs every S
    # that is in a weight.
    hooks = [o.register_step_pre_hook(before_step) for o in stepping]
    hooks += [o.register_step_post_hook(write) for o in stepping]
    shared = shared_tensors(model)
    paths = {}
    for name, layer in layers.items():
        path, reason = layer.path()
        others = shared.get(f"{name}.weight" if name else "weight")
        if others:
            if path != SEPARATE:
                path, reason = SCATTER, f"{others[0]} shares the weight's memory"
        else:
            layer._may_reside = True  # also later, if load_state_dict brings another weight
            layer._insert_sparse()
            if path != SEPARATE:
                path, reason = RESIDENT, ""
        paths[name] = f"{path}: {reason}" if reason else path
    return Residency(layers, paths, hooks)


def sync(model: nn.Module) -> None:
    """Write resident weights again, after anything but the optimizer has changed `values`.

    Raises:
        TypeError: `model` is not a module.
    """
    for layer in _layers(model, "sync").values():
        layer.sync()


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """A context in which every weight holds W, without a copy. Use it to save the original model.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: an adapter is merged; call unmerge first.
    """
    layers = _layers(model, "base_weights").values()
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


def _with_step_hooks(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizer and those that it wraps, outermost first, as far as they have hooks.

    Each may be stepped alone, and an outer one may change values after the inner one's step
    (Lookahead). accelerate's wrapper has no hooks of its own.
    """
    found = []
    seen = set[int]()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        if hasattr(optimizer, "_optimizer_step_post_hooks"):
            found.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def _layers(model: nn.Module, op: str) -> dict[str, RosaLinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected an nn.Module, got {type(model).__name__}")
    return {n: module for n, module in named_modules(model) if isinstance(module, RosaLinear)}
