"""The parts of an optimizer step: its seed, learning rates, gradients, and finite checks.

`step` counts the optimizer steps that were done before this one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from torch import Tensor, nn

from rosa_train.data.dataset import Dataset
from rosa_train.methods.schedule import learning_rate_factor
from rosa_train.run.checkpoint import checkpoints
from rosa_train.run.evaluate import target_loss
from rosa_train.run.setup import Run


def seed_of(*parts: object) -> int:
    """A seed for each use and step. Seeds of neighbouring steps are unrelated."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def set_learning_rates(run: Run, step: int) -> None:
    """Gives each parameter group the learning rate of the step."""
    args = run.train_args
    factor = learning_rate_factor(step, run.steps, args.warmup_steps, args.lr_scheduler_type)
    for group in run.adamw.param_groups:
        group["lr"] = group["peak_lr"] * factor


def backward(run: Run, shares: Sequence[Sequence[int]], targets: int) -> list[Tensor]:
    """Adds up the gradients of this process's micro-batches.

    Returns:
        For each micro-batch, its part of the step's mean loss over `targets` tokens.
    """
    losses = []
    for share in shares:
        with run.accelerator.autocast():
            batch = run.dataset.collate(share)
            loss = target_loss(run.model, batch, run.accelerator.device) / targets
        run.accelerator.backward(loss)
        losses.append(loss.detach())
    return losses


def check_loss(
    run: Run, step: int, loss: float, shares: Sequence[Sequence[int]], losses: Sequence[Tensor]
) -> None:
    """Raises `FloatingPointError` unless the loss over all processes is finite."""
    if not math.isfinite(loss):
        bad = [s for s, one in zip(shares, losses, strict=True) if not one.isfinite()]
        raise not_finite(run, run.dataset, step + 1, f"loss of {loss}", bad)


def check_evaluation(run: Run, step: int, loss: float, bad: Sequence[Sequence[int]]) -> None:
    """Raises `FloatingPointError` unless the evaluation loss after `step` steps is finite.

    `bad` has this process's batches whose loss is not.
    """
    if not math.isfinite(loss):
        assert run.eval_dataset is not None
        raise not_finite(run, run.eval_dataset, step, f"evaluation loss of {loss}", bad)


def clip_gradients(
    run: Run, step: int, trained: Sequence[nn.Parameter], shares: Sequence[Sequence[int]]
) -> float:
    """Clips the gradients to `max_grad_norm`. Returns their norm before that.

    Raises:
        FloatingPointError: the norm is not finite. With fp16's scaler the norm is returned: the
            scaler then skips the step.
    """
    limit = run.train_args.max_grad_norm or math.inf
    norm = float(run.accelerator.clip_grad_norm_(trained, limit))
    if run.accelerator.scaler is None and not math.isfinite(norm):
        raise not_finite(run, run.dataset, step + 1, f"gradient of norm {norm}", shares)
    return norm


def not_finite(
    run: Run, dataset: Dataset, step: int, what: str, bad: Sequence[Sequence[int]]
) -> FloatingPointError:
    """The error of numbers that are not finite, with records and last checkpoint."""
    saved = checkpoints(run.out)
    where = "; ".join(dataset.where(rows) for rows in bad[:2]) or "a batch of another process"
    if len(bad) > 2:  # NaN weights spoil every batch of the evaluation
        where += f"; and {len(bad) - 2} more batches"
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
    return FloatingPointError(
        f"train: expected finite numbers, got a {what} at step {step} on {where}; {last}"
    )
