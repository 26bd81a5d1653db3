"""Declares ops to torch: one torch.library fragment and one autograd path for all ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad

# The base of autograd functions. torch.autograd.Function would refuse torch.func transforms here:
# it expects to be called above the dispatcher, and these are called by a kernel below it.
AutogradFunction: Any = torch.autograd.function._SingleLevelFunction
# A global, because torch unregisters the ops when this object is garbage-collected.
_LIBRARY = torch.library.Library("rosa", "DEF")
# Every defined op, by name. A backward looks up another module's op here: sddmm's backward calls
# spmm and spmm's backward calls sddmm, so their modules cannot import each other.
OPS: dict[str, Any] = {}


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Any = None,
    differentiable: Sequence[int] = (),
    composed: Callable[..., Any] | None = None,
) -> Any:
    """Declare ``rosa::<schema>`` and return the op.

    The op works under forward-mode AD and the transforms of torch.func, or refuses them. Under vmap
    it runs once per element of the batch.

    Autograd is a hand-written kernel for the Autograd key. Measured per call, this costs 8 us
    without grad and 24 us with grad; `torch.library.custom_op` costs 19 us and 57 us.

    Args:
        schema: the op's schema without namespace.
        run: the implementation for every device, called below autograd.
        fake: returns outputs with the right shapes, dtypes and strides, without data.
        gradient: the :data:`AutogradFunction`, called with the op's arguments. It has a jvp unless
            there is `composed`. None if the op cannot be differentiated.
        differentiable: positions of the arguments for which `gradient` returns gradients.
        composed: the same result from differentiable ops, for calls under a transform.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rosa::{name}", fake, lib=_LIBRARY)
    op = OPS[name] = getattr(torch.ops.rosa, name).default

    def autograd(*args: Any) -> Any:
        if composed is not None and is_transforming():
            return composed(*args)
        if gradient is None:
            _refuse_tangents(name, args)
        elif must_differentiate(*(args[i] for i in differentiable)):
            return apply(gradient, *args)
        return below_autograd(op, *args)

    def batched(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
        if op._schema.is_mutable and dims[0] is None:
            raise RuntimeError(
                f"{name}: expected a batched target under vmap, got one target for all elements"
            )
        if info.batch_size == 0:
            raise RuntimeError(f"{name}: expected a batch of elements under vmap, got none")
        results = [
            op(*(_element(x, dim, i) for x, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if op._schema.is_mutable:
            return None, None
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_vmap(f"rosa::{name}", batched, lib=_LIBRARY)
    return op


def _element(x: Any, dim: Any, i: int) -> Any:
    """Element i of an argument that vmap batches along `dim`. A list has a list of such dims."""
    if isinstance(dim, list | tuple):
        return [_element(y, d, i) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, i)


def apply(gradient: Any, *args: Any) -> Any:
    """Call an :data:`AutogradFunction` below the dispatcher, inside one level of torch.func."""
    if not torch._C._are_functorch_transforms_active():
        return gradient.apply(*args)
    with enable_single_level_autograd_function():
        return gradient.apply(*args)


def is_transforming() -> bool:
    """Whether forward-mode AD or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Refuse tangents, which an op without `gradient` would lose."""
    if forward_ad._current_level >= 0:
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{name}: expected tensors without tangents, got forward-mode AD, which this "
                    "op does not support"
                )


def must_differentiate(*tensors: Tensor | None) -> bool:
    """Whether a call on `tensors` must be differentiated. An absent tensor is None."""
    if is_transforming():
        return True
    if torch.is_grad_enabled():
        for x in tensors:  # a generator inside any() would double the cost
            if x is not None and x.requires_grad:
                return True
    return False


def call(op: Any, differentiate: bool, *args: Any) -> Any:
    """Run `op`. If nothing is differentiated, skip the Python autograd kernel, which costs 4 us."""
    if differentiate or torch.compiler.is_compiling():
        return op(*args)
    return below_autograd(op, *args)


def is_plain_eager() -> bool:
    """Whether no compiler, dispatch mode or transform observes ops.

    Then Python may call an op's implementation directly. For an op of many arguments this saves
    15-30 us in the dispatcher.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transforming()
    )


def below_autograd(op: Any, *args: Any) -> Any:
    """Run `op` below the Autograd key, for callers that have handled autograd already.

    An autograd function's forward runs without grad mode. Outer levels of torch.func need it.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    with (
        torch._C._AutoDispatchBelowAutograd(),
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
    ):
        return op(*args)
