"""The scores of a weight's entries, by which masks are chosen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.masks.gradients import (
    Receiver,
    add_weight_gradients,
    base_weight,
    frozen_for_scoring,
)
from rosa_kernels.masks.robust_pca import rpca
from rosa_kernels.masks.spare_memory import spare_memory
from rosa_kernels.masks.targets import layer_shape, target_shapes

SCORES: Mapping[str, str] = MappingProxyType(
    {
        "grad_mean": "|mean of the batches' gradients|",
        "grad_mean_squared": "mean of the batches' squared gradients",
        "random": "uniform, from the seed and the module's name",
        "magnitude": "|W0|",
        "grasp": "W0 o (H g): entries whose removal would shrink the gradient most",
        "rpca": "|S| of the mean gradient = low rank L + sparse S",
    }
)
NEEDS_BATCHES = frozenset({"grad_mean", "grad_mean_squared", "grasp", "rpca"})
SIGNED = frozenset({"grasp"})  # ranked by value, not by magnitude

# Length of GraSP's finite-difference step, relative to the weights' norm. On two tiny models, 1e-3
# is 0.2 % off in float32 and has a cosine of 0.95 to 0.99 in bfloat16. 3e-4 is 0.02 % off in
# float32, but is lost in bfloat16's rounding. 1e-2 is 15 % off.
_STEP = 1e-3
# Looser than rpca's default, because a score's entries are only compared with each other.
_RPCA_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Data:
    """The batches and the loss of which gradients are taken.

    Attributes:
        batches: each takes one forward and backward.
        loss_fn: batch -> mean loss.
        tokens_of: batch -> number of tokens of which the loss is the mean.
        reduce: averages a tensor over the ranks, in place.
    """

    batches: Sequence[Any]
    loss_fn: Callable[[Any], Tensor]
    tokens_of: Callable[[Any], float]
    reduce: Callable[[Tensor], object] | None


def count_tokens(batch: object) -> float:
    """The number of tokens with a loss in a causal LM's batch; 1 if it has no ``labels``."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 1.0
    return float((labels[..., 1:] != -100).sum())


def random_scores(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Uniform (m, n) scores on the CPU, which depend only on the seed and the module's name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(shape, generator=generator)


def give_scores(
    score: str,
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    receive: Receiver,
    *,
    data: Data | None,
    seed: int,
    memory_bytes: int | None,
) -> None:
    """Call ``receive(name, scores)`` once for each target, in no particular order.

    `receive` must not keep the (m, n) scores, because only one target's may be in memory at a time.
    See :func:`rosa_kernels.masks.build.build_masks` for the scores.
    """
    if score == "random":
        for name, module in targets.items():
            receive(name, random_scores(name, layer_shape(module), seed))
    elif score == "magnitude":
        for name, module in targets.items():
            receive(name, base_weight(module))
    elif targets:
        assert data is not None
        with frozen_for_scoring(model):
            if score == "grasp":
                _give_grasp(targets, receive, data, memory_bytes)
            elif score == "rpca":
                _give_gradients(targets, _through_rpca(receive), data, False, memory_bytes)
            else:
                squared = score == "grad_mean_squared"
                _give_gradients(targets, receive, data, squared, memory_bytes)


def groups_within(
    shapes: Mapping[str, tuple[int, int]], memory_bytes: int | None
) -> list[list[str]]:
    """Groups of consecutive modules, so that each group's float32 matrices fit `memory_bytes`.

    The default is the size of the largest matrix.

    Raises:
        ValueError: `memory_bytes` is less than the largest matrix needs.
    """
    needs = {name: 4 * m * n for name, (m, n) in shapes.items()}
    largest = max(needs, key=needs.__getitem__)
    if memory_bytes is None:
        memory_bytes = needs[largest]
    if memory_bytes < needs[largest]:
        raise ValueError(
            f"build_masks: expected memory_bytes of at least {needs[largest]} (what {largest!r} of "
            f"shape {shapes[largest]} needs), got {memory_bytes}"
        )
    groups: list[list[str]] = []
    used = 0
    for name, need in needs.items():
        if not groups or used + need > memory_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += need
    return groups


def default_memory(score: str, targets: Mapping[str, nn.Module], processes: int = 1) -> int:
    """The memory in bytes for the sums of one group: a quarter of what is free, if that is enough.

    It is at least what the largest target needs, and that for grasp: its scores depend on the
    groups, so free memory must not choose them. On a CPU the processes of a run share the memory.
    """
    needs = {name: 4 * m * n for name, (m, n) in target_shapes(targets).items()}
    largest = max(needs.values(), default=0)
    if score == "grasp":
        return largest
    devices = {next(module.parameters()).device for module in targets.values()}
    shared = processes if any(device.type == "cpu" for device in devices) else 1
    return max(largest, spare_memory(devices) // shared)


def one_pass_memory(shapes: Mapping[str, tuple[int, int]]) -> int:
    """The memory in bytes with which all sums fit, so that every batch is read once."""
    return sum(4 * m * n for m, n in shapes.values())


def forwards(
    score: str, shapes: Mapping[str, tuple[int, int]], batches: int, memory_bytes: int | None
) -> int:
    """The number of the model's forwards that a score takes with `batches` batches."""
    if score not in NEEDS_BATCHES or not shapes:
        return 0
    if score != "grasp" and batches == 1:
        return 1
    return batches * len(groups_within(shapes, memory_bytes)) * (3 if score == "grasp" else 1)


def _weights(data: Data) -> list[float]:
    """Each batch's number of tokens, or 1 if there is only one batch on one rank."""
    if len(data.batches) == 1 and data.reduce is None:
        return [1.0]
    return [float(data.tokens_of(batch)) for batch in data.batches]


def _reduced(receive: Receiver, data: Data) -> Receiver:
    def reduce_then_receive(name: str, scores: Tensor) -> None:
        if data.reduce is not None:
            data.reduce(scores)
        receive(name, scores)

    return reduce_then_receive


def _give_gradients(
    targets: Mapping[str, nn.Module],
    receive: Receiver,
    data: Data,
    squared: bool,
    memory_bytes: int | None,
) -> None:
    receive = _reduced(receive, data)
    weights = _weights(data)
    if len(data.batches) == 1:
        # Each gradient is complete when it is made. So one pass is enough, and none is kept.
        add_weight_gradients(
            targets, data.batches, data.loss_fn, weights, squared=squared, receive=receive
        )
        return
    for group in groups_within(target_shapes(targets), memory_bytes):
        sums = add_weight_gradients(
            {name: targets[name] for name in group},
            data.batches,
            data.loss_fn,
            weights,
            squared=squared,
        )
        _give_away(sums, group, receive)


def _give_grasp(
    targets: Mapping[str, nn.Module], receive: Receiver, data: Data, memory_bytes: int | None
) -> None:
    """W0 o (H g), with H g by a central difference along the group's gradient g."""
    weights = _weights(data)
    for group in groups_within(target_shapes(targets), memory_bytes):
        members = {name: targets[name] for name in group}

        def add(
            signs: int,
            members: Mapping[str, nn.Module] = members,
            **options: Any,
        ) -> dict[str, Tensor]:
            signed = [signs * weight for weight in weights]
            return add_weight_gradients(members, data.batches, data.loss_fn, signed, **options)

        direction = add(1)
        for name in group:
            if data.reduce is not None:
                data.reduce(direction[name])
        length = _norm(direction.values())
        if not 0 < length < math.inf:
            raise ValueError(
                f"build_masks: expected finite gradients that are not all 0 for {group[0]!r}"
                f"{' and its group' if len(group) > 1 else ''}, got a norm of {length}"
            )
        step = _STEP * _norm(base_weight(module) for module in members.values()) / length
        for shift in direction.values():
            shift *= step
        sums = add(1, shift=direction)
        for shift in direction.values():
            shift.neg_()
        sums = add(-1, shift=direction, sums=sums)
        del direction
        for name in group:
            if data.reduce is not None:
                data.reduce(sums[name])
            sums[name].mul_(base_weight(targets[name])).div_(2 * step)
        _give_away(sums, group, receive)


def _through_rpca(receive: Receiver) -> Receiver:
    """Score entries by |S| of rpca. Entries where S is zero rank below, by |gradient|."""

    def pursue(name: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"build_masks: expected finite gradients of {name!r}, got NaN or infinity"
            )
        _, sparse = rpca(gradient, tolerance=_RPCA_TOLERANCE)
        scores = sparse.abs_()
        found = scores > 0
        if bool(found.any()):
            rest = gradient.abs_()
            scale = float(scores[found].min()) / max(2 * float(rest.max()), 1e-38)
            scores = torch.where(found, scores, rest.mul_(scale))
        else:
            scores = gradient.abs_()
        receive(name, scores)

    return pursue


def _give_away(sums: dict[str, Tensor], names: Iterable[str], receive: Receiver) -> None:
    for name in names:
        receive(name, sums.pop(name))


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]
    return math.sqrt(sum(float(norm) ** 2 for norm in norms))
