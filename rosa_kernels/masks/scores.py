"""What makes an entry of a weight worth training: the scores that masks are chosen by."""

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

# Length of GraSP's finite-difference step as a share of the weights' norm. On two tiny models this
# one is 0.2 % off in float32 and at a cosine of 0.95 to 0.99 in bfloat16; 3e-4 would be 0.02 % off
# in float32 but drown in bfloat16's rounding, 1e-2 is 15 % off.
_STEP = 1e-3
# Of a score and not of a result: its entries are only compared.
_RPCA_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Data:
    """What the gradients are taken of.

    batches: one forward and backward each. loss_fn: batch -> mean loss. tokens_of: batch -> how
    many tokens that is the mean of. reduce: averages a tensor over ranks, in place.
    """

    batches: Sequence[Any]
    loss_fn: Callable[[Any], Tensor]
    tokens_of: Callable[[Any], float]
    reduce: Callable[[Tensor], object] | None


def count_tokens(batch: object) -> float:
    """How many tokens of a causal LM's batch have a loss; 1 for what has no ``labels``."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return 1.0
    return float((labels[..., 1:] != -100).sum())


def random_scores(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """(m, n) uniform scores that depend on the seed and the module's name only, made on the CPU."""
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

    `receive` must not keep the (m, n) scores: one target's at a time is what fits. See
    :func:`rosa_kernels.masks.build.build_masks` for the scores.
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
    """Consecutive modules whose float32 matrices fit `memory_bytes` together.

    By default, as many as fit the largest one's.

    Raises:
        ValueError: less than the largest one needs.
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


def forwards(
    score: str, shapes: Mapping[str, tuple[int, int]], batches: int, memory_bytes: int | None
) -> int:
    """How many forwards of the model a score of `batches` batches takes."""
    if score not in NEEDS_BATCHES or not shapes:
        return 0
    if score != "grasp" and batches == 1:
        return 1
    return batches * len(groups_within(shapes, memory_bytes)) * (3 if score == "grasp" else 1)


def _weights(data: Data) -> list[float]:
    """Each batch's number of tokens; 1 where there is nothing to weigh it against."""
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
        # Each gradient is complete when it is made: one pass, and none waits for another.
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
    """|S| where the pursuit left S something; everything else below that, by |gradient|."""

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
