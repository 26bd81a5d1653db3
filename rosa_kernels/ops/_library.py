"""How an op is declared to torch: one torch.library fragment, one autograd path for all ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Held for the life of the process: torch unregisters the ops when the library is collected.
_LIBRARY = torch.library.Library("rosa", "DEF")
# Every op that is defined, by name. A backward takes other modules' ops from here: that of sddmm
# calls spmm, and that of spmm calls sddmm.
OPS: dict[str, Any] = {}


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: type[torch.autograd.Function] | None = None,
    differentiable: Sequence[int] = (),
) -> Any:
    """Declare ``rosa::<schema>`` and return the op.

    Measured without / with grad, `torch.library.custom_op` costs 19 / 57 us a call, this
    hand-written Autograd-key path 8 / 24 us.

    Args:
        schema: the op's schema without namespace.
        run: the implementation for every device, called below autograd.
        fake: shapes, dtypes and strides of the outputs.
        gradient: the autograd function, called with the op's arguments.
        differentiable: positions of the arguments that `gradient` gives gradients for.
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
    """Whether autograd has to record a call on `tensors`; absent ones are None."""
    if torch.is_grad_enabled():
        for x in tensors:  # a generator inside any() would double the cost
            if x is not None and x.requires_grad:
                return True
    return False


def call(op: Any, differentiate: bool, *args: Any) -> Any:
    """Run `op`; past the Python autograd entry, 4 us, where there is nothing to differentiate."""
    if differentiate or torch.compiler.is_compiling():
        return op(*args)
    return below_autograd(op, *args)


def is_plain_eager() -> bool:
    """Whether nothing traces or counts ops, so that Python may call what they would run.

    For ops of many arguments, which cost 15-30 us to hand through the dispatcher.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def below_autograd(op: Any, *args: Any) -> Any:
    """Run `op` where autograd has been dealt with: from inside its own autograd function."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
