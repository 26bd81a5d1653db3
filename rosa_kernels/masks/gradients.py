"""Gradients of full weights, one layer at a time, although no weight requires a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import is_conv1d, layer_shape
from rosa_kernels.masks.topk import chunk_elements

# Takes a module's name and its (m, n) float32 sum, which is freed when the receiver drops it.
Receiver = Callable[[str, Tensor], None]


def base_weight(module: nn.Module) -> Tensor:
    """W0 of a linear layer as (m, n): a view, or a copy if the layer's weight holds an adapter."""
    stored = getattr(module, "base_weight", None)
    weight = stored() if callable(stored) else module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    transposed = getattr(module, "fan_in_fan_out", is_conv1d(module))
    return weight.T if transposed else weight


@contextmanager
def frozen_for_scoring(model: nn.Module) -> Iterator[None]:
    """A context with dropout off and parameters frozen; afterwards the model is as it was.

    A layer that checkpoints its activations does so in train mode only, so its own flag is on.
    Otherwise the pass would need the memory that checkpointing saves. The modules inside the layer,
    where the dropout is, are in eval mode.
    """
    modules, parameters = [*model.modules()], [*model.parameters()]
    training = [module.training for module in modules]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)


def add_weight_gradients(
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    loss_fn: Callable[[Any], Tensor],
    weights: Sequence[float],
    *,
    squared: bool = False,
    sums: dict[str, Tensor] | None = None,
    shift: Mapping[str, Tensor] | None = None,
    receive: Receiver | None = None,
) -> dict[str, Tensor]:
    """Sum weight * g or weight * g**2 over the batches, with g = dL/dW of each target.

    A hook passes each target's output through an identity, which saves the input x and gets dy in
    backward. There g = dy^T x is computed in float32. So no weight requires a gradient, and the
    base may have any dtype. The identity's output requires a gradient, so the graph above the
    first target exists although all weights are frozen. Backward stops at the lowest target.

    Args:
        targets: modules by name.
        batches: each takes one forward and backward; `loss_fn` of each returns a scalar.
        weights: one number for each batch.
        squared: whether to square each batch's gradient.
        sums: (m, n) float32 tensors to add to; by default zeros, made when first needed.
        shift: (m, n) tensors D. The loss is then that of weights W + D. W itself is not changed,
            because x D^T is added to the output.
        receive: for a single batch only. It gets each sum in backward, as soon as the sum is
            complete. Those sums are not returned.

    Returns:
        The sums by name; {} if `receive` got them.

    Raises:
        ValueError: a loss is not finite, or no loss depends on some target.
        TypeError: a loss is not a scalar tensor.
    """
    taps = {
        name: _Tap(name, layer_shape(module), squared, (sums or {}).get(name))
        for name, module in targets.items()
    }
    with ExitStack() as hooks:
        anchor = torch.zeros((), requires_grad=True)
        for name, module in targets.items():
            tap = taps[name]
            tap.receive = receive
            tap.shift = None if shift is None else shift[name]
            handle = module.register_forward_hook(partial(tap.hook, anchor), with_kwargs=True)
            hooks.callback(handle.remove)
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            for tap in taps.values():
                tap.begin(weight)
            with torch.enable_grad():
                loss = loss_fn(batch)
            _check_loss(loss, index)
            for tap in taps.values():
                tap.counting = False  # a hook in backward is of a checkpoint's second forward
            if loss.requires_grad:
                # Unlike loss.backward(), this touches no .grad and visits nothing below the taps.
                torch.autograd.grad(loss, anchor, allow_unused=True)
            del loss
            for tap in taps.values():
                tap.end()
    unreached = [name for name, tap in taps.items() if not tap.reached]
    if unreached:
        raise ValueError(
            f"build_masks: expected a loss that depends on every target, got {len(unreached)} of "
            f"{len(taps)} without a gradient: {', '.join(unreached[:5])}"
            f"{', ...' if len(unreached) > 5 else ''} (not part of this forward, or inside a "
            "reentrant checkpoint: use use_reentrant=False)"
        )
    return {name: tap.sum for name, tap in taps.items() if tap.sum is not None}


def _check_loss(loss: object, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"build_masks: expected loss_fn to return a scalar tensor, got {got}")
    if not bool(loss.isfinite()):
        raise ValueError(
            f"build_masks: expected a finite loss, got {loss.item()} for batch {index}"
        )


class _Tap:
    """One target's running sum, and the hook that feeds it."""

    def __init__(
        self, name: str, shape: tuple[int, int], squared: bool, start: Tensor | None
    ) -> None:
        self.name, self.shape, self.squared = name, shape, squared
        self.sum = start
        self.partial: Tensor | None = None  # a batch's g of a module used more than once
        self.shift: Tensor | None = None
        self.receive: Receiver | None = None
        self.reached = False

    def begin(self, weight: float) -> None:
        self.weight, self.uses, self.pending, self.counting = weight, 0, 0, True

    def hook(
        self,
        anchor: Tensor,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.counting:
            self.uses += 1
            self.pending += 1
        if self.shift is not None:
            output = output + nn.functional.linear(x, self.shift.to(x.dtype))
        tapped: Tensor = _Identity.apply(output, x, anchor, self)  # type: ignore[no-untyped-call]
        return tapped

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one use of the module; after the batch's last use, call `end`."""
        m, n = self.shape
        dy, x = dy.reshape(-1, m), x.reshape(-1, n)
        if self.sum is None:
            self.sum = torch.zeros(self.shape, dtype=torch.float32, device=dy.device)
        self.reached = True
        self.pending -= 1
        if not self.squared:
            _add_product(self.sum, dy, x, self.weight)
        elif self.receive is not None:
            _add_product(self.sum, dy, x)  # the only batch: `end` squares it in place
        elif self.uses == 1:
            # Only a 16th of g exists at a time.
            rows = max(m // 16, 1)
            for row in range(0, m, rows):
                g = self.sum.new_zeros((min(rows, m - row), n))
                _add_product(g, dy[:, row : row + rows], x)
                self.sum[row : row + rows].addcmul_(g, g, value=self.weight)
        else:
            if self.partial is None:
                self.partial = torch.zeros_like(self.sum)
            _add_product(self.partial, dy, x)
        if self.pending == 0:
            self.end()

    def end(self) -> None:
        """Finish a batch. Also called after backward, as a loss may not depend on every use."""
        if self.partial is not None:
            assert self.sum is not None
            self.sum.addcmul_(self.partial, self.partial, value=self.weight)
            self.partial = None
        if self.receive is not None and self.sum is not None:
            complete, self.sum = self.sum, None  # handed over
            if self.squared:
                complete.square_().mul_(self.weight)
            self.receive(self.name, complete)


class _Identity(torch.autograd.Function):
    """Returns `output`. In backward, the tap gets its gradient dy and the module's input x."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, tap: _Tap) -> Tensor:
        # x is saved through autograd, so that checkpoints and saved-tensor hooks work.
        ctx.save_for_backward(x)
        ctx.tap = tap
        # If this were a view, the model could not change it in place (`hidden += residual`).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False), torch.no_grad():
            ctx.tap.add(dy, x)
        return dy, None, None, None


def _add_product(out: Tensor, dy: Tensor, x: Tensor, weight: float = 1.0) -> None:
    """out (m, n) += weight * dy^T x in float32, of dy (tokens, m) and x (tokens, n)."""
    tokens = len(x)
    # Operands of other dtypes are converted, `step` tokens at a time.
    step = tokens
    if not dy.dtype == x.dtype == torch.float32:
        step = chunk_elements(out.numel()) // max(*out.shape, 1)
    for start in range(0, tokens, max(step, 1)):
        part = slice(start, start + max(step, 1))
        out.addmm_(dy[part].T.float(), x[part].float(), alpha=weight)
