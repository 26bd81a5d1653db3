"""Declares ops to torch: one torch.library fragment and one autograd path for all ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# A global, because torch unregisters the ops when this object is garbage-collected.
_LIBRARY = torch.library.Library("rosa", "DEF")
# Every defined op, by name. A backward looks up another module's op here: sddmm's backward calls
# spmm and spmm's backward calls sddmm, so their modules cannot import each other.
OPS: dict[str, Any] = {}


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: type[torch.autograd.Function] | None = None,
    differentiable: Sequence[int] = (),
) -> Any:
    """Declare ``rosa::<schema>`` and return the op.

    Autograd is a hand-written kernel for the Autograd key. Measured per call, this costs 8 us
    without grad and 24 us with grad; `torch.library.custom_op` costs 19 us and 57 us.

    Args:
        schema: the op's schema without namespace.
        run: the implementation for every device, called below autograd.
        fake: returns outputs with the right shapes, dtypes and strides, without data.
        gradient: the autograd function, called with the op's arguments; None if there is none.
        differentiable: positions of the arguments for which `gradient` returns gradients.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rosa::{name}", fake, lib=_LIBRARY)
    op = OPS[name] = getattr(torch.ops.rosa, name).default

    if gradient is not None:

        def autograd(*args: Any) -> Any:
            if any_requires_grad(*(args[i] for i in differentiable)):
                return gradient.apply(*args)
            return below_autograd(op, *args)

        _LIBRARY.impl(name, autograd, "Autograd")
    return op


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on `tensors`. An absent tensor is None."""
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
    """Whether no compiler and no dispatch mode observes ops.

    Then Python may call an op's implementation directly. For an op of many arguments this saves
    15-30 us in the dispatcher.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def below_autograd(op: Any, *args: Any) -> Any:
    """Run `op` below the Autograd key, for callers that have handled autograd already."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
