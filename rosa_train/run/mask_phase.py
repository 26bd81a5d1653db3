"""The choice of a run's masks: RoSA's Algorithm 1 on batches of the training data."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.scores import forwards
from rosa_kernels.masks.targets import target_shapes
from rosa_train.adapters.switch import adapter_targets
from rosa_train.data.order import BatchOrder
from rosa_train.run import distributed
from rosa_train.run.evaluate import target_count, target_loss
from rosa_train.run.setup import Run
from rosa_train.run.step import seed_of

# Under fp16 the loss is multiplied by this. Gradients of single weights would underflow otherwise.
# A positive factor changes no order of scores.
_FP16_SCALE = 1024.0


def choose_masks(run: Run, say: Callable[[str], None]) -> dict[str, CsrPattern]:
    """The mask of each target layer, chosen on the rows of `mask_steps` optimizer steps.

    The rows are in an order of their own, not in that of training. `say` takes a warning if few
    gradients fit into memory at a time.
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
    passes = forwards(args.mask_score, target_shapes(targets), count, args.mask_bytes())
    if passes > 3 * count:
        say(
            f"masks: {passes} forwards for {count} batches, because the gradients of few layers "
            "are summed at a time; a larger --mask_memory needs fewer"
        )

    def mean_loss(batch: dict[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            loss = target_loss(run.model, batch, accelerator.device)
        return loss * (scale / target_count(batch))

    def mean_over_ranks(tensor: Tensor) -> Tensor:
        return distributed.all_reduce(tensor).div_(world)

    return build_masks(
        run.model,
        targets,
        run.allocation.nnz,
        score=args.mask_score,
        batches=[run.dataset.collate(order.batch(index)) for index in range(count)],
        loss_fn=mean_loss,
        scope=args.mask_scope,
        seed=run.train_args.seed,
        memory_bytes=args.mask_bytes(),
        reduce=mean_over_ranks if parallel else None,
        broadcast=distributed.broadcast if parallel else None,
    )
