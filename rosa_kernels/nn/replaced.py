"""Which layers a RosaLinear can replace, and what it takes over from the layer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from rosa_kernels.ops._validate import FLOATS

# The layer makes its own: it has other tensors and submodules than the one that it replaces.
_ITS_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
# Wrapped hooks of these kinds hold a reference to their module.
_LOAD_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def why_not_plain(linear: object) -> str:
    """What is wrong with `linear` as a layer to replace, to follow "got one"; "" if nothing is.

    A RosaLinear computes x W^T + bias itself. So it would change the function of a layer that
    computes anything else, and have no effect in a parent that reads the layer's weight.
    """
    cls = type(linear)
    # Conv1D is recognised by its name, because transformers may not be installed.
    known = next((c for c in cls.__mro__ if c is nn.Linear or c.__name__ == "Conv1D"), None)
    if known is None or not isinstance(linear, nn.Module):
        return f"of class {cls.__name__}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "of class NonDynamicallyQuantizableLinear: nn.MultiheadAttention reads its weight"
    if cls.forward is not known.forward:  # type: ignore[attr-defined]
        return f"of class {cls.__name__}, which has a forward of its own"
    # accelerate leaves the class's own forward on the instance when it removes its hooks.
    if vars(linear).get("forward", linear.forward) != MethodType(cls.forward, linear):  # type: ignore[attr-defined]
        return "whose forward was replaced, as accelerate's dispatch_model does; dispatch later"
    groups = (linear._parameters, linear._buffers, linear._modules)
    held = [name for group in groups for name, value in group.items() if value is not None]
    if "weight" not in held or not {*held} <= {"weight", "bias"}:
        return (
            f"with {', '.join(held) or 'none'} in place of the parameters weight and bias; remove "
            "parametrizations, weight_norm and pruning first"
        )
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if is_lazy(weight):
        return "that is not initialised yet; run one forward first"
    if weight.dim() != 2:
        return f"with a weight of shape {tuple(weight.shape)}"
    if weight.dtype not in FLOATS:
        return f"with a weight of dtype {weight.dtype}"
    # The protocol of tensors that wrap others: torchao's quantised ones, and DTensor.
    if hasattr(weight, "__tensor_flatten__"):
        return f"with a weight of class {type(weight).__name__}"
    return ""


def attributes(linear: nn.Module, layer: nn.Module) -> dict[str, Any]:
    """What `linear` has beside tensors, for `layer`: its mode, its hooks, what its users noted.

    Both modules share the dictionaries of hooks, so that a hook's handle removes it from both.
    """
    found = {
        name: value
        for name, value in vars(linear).items()
        if name not in _ITS_OWN and not hasattr(type(layer), name)
    }
    return found | load_hooks(linear, layer)


def template(linear: nn.Module) -> nn.Module:
    """A copy of `linear` without what its RosaLinear has in its place: tensors and load hooks.

    A weight in it would stay alive when load_state_dict(assign=True) or a move replaces it.
    """
    copied = copy.copy(linear)
    copied._parameters = {"weight": None, "bias": None}
    vars(copied).pop("forward", None)  # it is bound to `linear`
    vars(copied).update({kind: OrderedDict() for kind in _LOAD_HOOKS})
    return copied


def load_hooks(
    source: nn.Module, target: nn.Module, without: Any = None
) -> dict[str, OrderedDict[int, Any]]:
    """The load_state_dict hooks of `source`, in new dictionaries, with `target` as their module."""
    return {
        kind: OrderedDict(
            (key, type(hook)(hook.hook, target) if getattr(hook, "with_module", False) else hook)
            for key, hook in getattr(source, kind).items()
            if hook is not without
        )
        for kind in _LOAD_HOOKS
    }
