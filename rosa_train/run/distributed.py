"""The collectives of a run on several processes. With one process they do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Gradients are copied into flat buffers of this size. Those of adapters fit into one buffer. The
# size limits the memory for these copies in full fine-tuning.
_BUCKET_BYTES = 256 * 2**20


def is_parallel() -> bool:
    """Whether the run has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensor: Tensor) -> Tensor:
    """Sums the tensor over all processes, in place, and returns it."""
    if is_parallel():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Copies the first process's tensor into the others', in place, and returns it."""
    if is_parallel():
        dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    """Waits until all processes are here."""
    if is_parallel():
        dist.barrier()


def reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums the gradients over all processes, in place.

    `DistributedDataParallel` is not used, because it fixes its parameters when it is made, and the
    masks add parameters later. Its overlap with the backward pass is lost. That costs little: an
    adapter's gradients are about 1 % of the model, in one collective per optimizer step.
    """
    if not is_parallel():
        return
    for bucket in _buckets(parameters):
        # A process without rows of a short batch has no gradients. It contributes zeros.
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        other_type = bool(bucket) and bucket[0].dtype != parameter.dtype
        if bucket and (size + nbytes > _BUCKET_BYTES or other_type):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket
