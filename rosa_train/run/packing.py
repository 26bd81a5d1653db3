"""Whether a model keeps packed examples apart. If it does not, `--packing` is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rosa_train.data.collate import collate_packed
from rosa_train.data.examples import Example
from rosa_train.run.evaluate import eval_mode, target_loss

# Tokens of each of the two examples. More than a convolution of Mamba or LFM2 reaches (4).
_TOKENS = 8


def why_not_packed(
    model: Any,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str | None:
    """Why the model must not get packed rows, or None if it keeps packed examples apart.

    Two examples are packed, and the second one's loss is computed as in training. Its gradient in
    the first one's embeddings is exactly zero if the examples are apart, because masked attention
    multiplies by zero. So no tolerance is needed.

    The rejected alternative compares the logits of two forwards that differ in the first example.
    In a mixture of experts they differ by a rounding also if nothing leaks. In bfloat16 a rounding
    was larger than the leak of an untrained LFM2.
    """
    ids = [i % model.get_input_embeddings().num_embeddings for i in range(3, 3 + 2 * _TOKENS)]
    first, second = (
        Example(ids[:_TOKENS], [], "", "first"),
        Example([], ids[_TOKENS:], "", "second"),
    )
    batch = collate_packed([[first, second]], 0)
    embedded: list[Tensor] = []

    def tap(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(tap)
    try:
        with eval_mode(model), torch.enable_grad(), autocast():
            loss = target_loss(model, batch, device)
        (gradient,) = torch.autograd.grad(loss, embedded[0])
    except TypeError as error:  # its forward has no such argument
        return f"its forward does not take the positions of packed examples ({error})"
    finally:
        hook.remove()
    if bool((gradient.reshape(2 * _TOKENS, -1)[:_TOKENS] == 0).all()):
        return None
    return "a change in one example changes the loss of the next one in its row"
