"""Gradients of full weights, one layer at a time, with no weight that requires a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.targets import is_conv1d, layer_shape
from rosa_kernels.masks.topk import chunk_elements

# Receives (module name, its (m, n) float32 sum), which is freed as soon as the receiver lets go.
Receiver = Callable[[str, Tensor], None]


def base_weight(module: nn.Module) -> Tensor:
    """The frozen weight W0 of a linear layer as (m, n): a view of it where it lies as such."""
    stored = getattr(module, "base_weight", None)
    weight = stored() if callable(stored) else module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    transposed = getattr(module, "fan_in_fan_out", is_conv1d(module))
    return weight.T if transposed else weight


@contextmanager
def frozen_for_scoring(model: nn.Module) -> Iterator[None]:
    """No dropout, and gradients for nothing but the taps; afterwards all is as it was.

    Layers that checkpoint their activations only do so in train mode: that one flag of theirs (not
    of the modules inside, where the dropout is) stays, or the pass would need the memory that
    checkpointing was switched on to save.
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
    """Sum over the batches of weight * g, or weight * g**2, with g = dL/dW of each target.

    A hook passes each target's output through an identity that saves the input x and, in backward,
    gets dy: g = dy^T x is made there, in float32, so no weight requires a gradient, the base may
    have any dtype, and the graph above the first target exists although all is frozen. Backward
    stops at the lowest target.

    Args:
        targets: by name.
        batches: one forward and backward each; `loss_fn` of each is a scalar.
        weights: one for each batch.
        squared: square each batch's gradient.
        sums: (m, n) float32 tensors to add to, by default zeros, made when first needed.
        shift: (m, n) tensors D: the loss is that of weights W + D, though W itself is not touched
            (x D^T is added to the output).
        receive: of a single batch only: gets each sum in backward as soon as it is complete,
            instead of its being returned with the others at the end.

    Returns:
        The sums, {} if they went to `receive`.

    Raises:
        ValueError: a loss that is not finite; a target that no loss depends on.
        TypeError: a loss that is not a scalar tensor.
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
                tap.counting = False  # what runs in backward is a checkpoint's second forward
            if loss.requires_grad:
                # Not loss.backward(): no .grad is touched, and nothing below the taps is visited.
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
        self.partial: Tensor | None = None  # of one batch, of a module used more than once
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
        """Fold in one use's gradient; give the sum away after the batch's last."""
        m, n = self.shape
        dy, x = dy.reshape(-1, m), x.reshape(-1, n)
        if self.sum is None:
            self.sum = torch.zeros(self.shape, dtype=torch.float32, device=dy.device)
        self.reached = True
        self.pending -= 1
        if not self.squared:
            _add_product(self.sum, dy, x, self.weight)
        elif self.receive is not None:
            _add_product(self.sum, dy, x)  # of the only batch: squared where it is, at the end
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
        """The batch has no more for this target (of some uses a loss may not depend at all)."""
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
    """output, whose gradient a tap sees together with the input x that belongs to it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, tap: _Tap) -> Tensor:
        # Saved as autograd saves it, so that checkpoints and saved-tensor hooks work.
        ctx.save_for_backward(x)
        ctx.tap = tap
        # A view would forbid the model to go on in place (`hidden += residual`).
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
    # Operands of other dtypes are converted so many tokens at a time.
    step = tokens
    if not dy.dtype == x.dtype == torch.float32:
        step = chunk_elements(out.numel()) // max(*out.shape, 1)
    for start in range(0, tokens, max(step, 1)):
        part = slice(start, start + max(step, 1))
        out.addmm_(dy[part].T.float(), x[part].float(), alpha=weight)
