"""The collectives of a run on several processes; on one they do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Gradients travel in flat buffers of this size: for adapters all of them in one. It bounds what
# full fine-tuning pays in memory for its copy.
_BUCKET_BYTES = 256 * 2**20


def is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if is_parallel():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor, in place."""
    if is_parallel():
        dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    if is_parallel():
        dist.barrier()


def reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums the gradients over the processes, in place.

    Not `DistributedDataParallel`: what trains changes when the masks are built, and DDP fixes its
    parameters at construction. Overlap with the backward pass is what this gives up; gradients
    are about 1 % of the model here, one collective per optimizer step.
    """
    if not is_parallel():
        return
    for bucket in _buckets(parameters):
        # A process whose share of a short batch is empty has no gradients: it adds zeros.
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
