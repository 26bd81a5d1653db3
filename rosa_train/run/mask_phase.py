"""The choice of a run's masks: RoSA's Algorithm 1 on batches of the training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.scores import default_memory, forwards, one_pass_memory
from rosa_kernels.masks.targets import target_shapes
from rosa_train.adapters.switch import adapter_targets
from rosa_train.data.order import BatchOrder
from rosa_train.run import distributed
from rosa_train.run.evaluate import target_count, target_loss
from rosa_train.run.setup import Run
from rosa_train.run.step import not_finite, seed_of

# Under fp16 the loss is multiplied by this. Gradients of single weights would underflow otherwise.
# A positive factor changes no order of scores.
_FP16_SCALE = 1024.0


def choose_masks(run: Run, say: Callable[[str], None]) -> dict[str, CsrPattern]:
    """The mask of each target layer, chosen on the rows of `mask_steps` optimizer steps.

    The rows are in an order of their own, not in that of training. `say` takes a warning if not all
    gradients fit into memory at a time.

    Raises:
        FloatingPointError: a loss, gradient or score is not finite.
    """
    accelerator, args = run.accelerator, run.method_args
    world, parallel = accelerator.num_processes, distributed.is_parallel()
    # Every process has the same number of batches. The reduction needs that.
    order = BatchOrder(
        len(run.dataset),
        run.train_args.per_device_train_batch_size,
        seed=seed_of(run.train_args.seed, "masks"),
        world=world,
        rank=accelerator.process_index,
    )
    count = args.mask_steps * run.train_args.gradient_accumulation_steps
    scale = 1.0 if accelerator.scaler is None else _FP16_SCALE
    targets = adapter_targets(run.model)
    memory = _memory(run, targets)
    shapes = {
        name: shape
        for name, shape in target_shapes(targets).items()
        if run.allocation.nnz[name] or args.mask_scope == "global"
    }
    needed = one_pass_memory(shapes)
    passes, fewest = (forwards(args.mask_score, shapes, count, m) for m in (memory, needed))
    if passes > fewest:
        say(
            f"masks: {passes} forwards for {count} batches, because gradients are summed in "
            f"{memory >> 20} MiB; {fewest} forwards with --mask_memory {needed}"
        )

    rows = [order.batch(index) for index in range(count)]
    batches = [run.dataset.collate(chosen) for chosen in rows]

    def failed(what: str, where: list[list[int]]) -> FloatingPointError:
        step = run.mask_step or 0
        return not_finite(run, run.dataset, step, f"{what} in the mask phase", where)

    def mean_loss(batch: dict[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            loss = target_loss(run.model, batch, accelerator.device)
        if not bool(loss.isfinite()):
            where = [r for r, one in zip(rows, batches, strict=True) if one is batch]
            raise failed(f"loss of {loss.item()}", where)
        return loss * (scale / target_count(batch))

    def mean_over_ranks(tensor: Tensor) -> Tensor:
        return distributed.all_reduce(tensor).div_(world)

    try:
        return build_masks(
            run.model,
            targets,
            run.allocation.nnz,
            score=args.mask_score,
            batches=batches,
            loss_fn=mean_loss,
            scope=args.mask_scope,
            seed=run.train_args.seed,
            memory_bytes=memory,
            reduce=mean_over_ranks if parallel else None,
            broadcast=distributed.broadcast if parallel else None,
        )
    except ValueError as error:
        if "expected finite" not in str(error):  # gradients or scores; a loss has been checked
            raise
        raise failed(f"gradient that is not finite ({error})", rows) from error


def _memory(run: Run, targets: Mapping[str, nn.Module]) -> int:
    """The bytes for the sums of gradients: `mask_memory`, or a share of what is free.

    Every process takes the first one's number, because groups of layers must be the same in all.
    """
    given = run.method_args.mask_bytes()
    if given is not None:
        return given
    accelerator = run.accelerator
    memory = default_memory(run.method_args.mask_score, targets, accelerator.num_processes)
    return int(distributed.broadcast(torch.tensor(memory, device=accelerator.device)))
