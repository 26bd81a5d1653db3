"""The order of examples: which of them each step takes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchOrder:
    """The batches of ``count`` examples, as a function of seed and step.

    Every epoch is shuffled by (seed, epoch). There is no other state, so a run can resume at any
    step. Each step takes the next ``batch_size * world`` examples of the shuffle, and deals them to
    the ranks in turn. The last step of an epoch takes the rest. If ``world`` does not divide the
    rest, at most ``world - 1`` of the epoch's first examples fill it up. So all ranks get equal
    numbers, and no rank waits for another. Every example comes at least once per epoch, and exactly
    once if ``world`` divides ``count``.

    Raises:
        ValueError: count, batch_size or world is below 1, or the rank is outside [0, world).
    """

    count: int
    batch_size: int
    seed: int = 42
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"BatchOrder: expected {name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"BatchOrder: expected rank in [0, {self.world}), got {self.rank}")

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return -(-self.count // (self.batch_size * self.world))

    def epoch(self, step: int) -> int:
        """The epoch of a step. Both are counted from 0 over the whole run."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """This rank's examples at ``step``. Steps are counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"BatchOrder: expected step >= 0, got {step}")
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _shuffled(self.count, self.seed, epoch)
        start = step * self.batch_size * self.world
        stop = min(start + self.batch_size * self.world, self.count)
        per_rank = -(-(stop - start) // self.world)
        dealt = (start + i * self.world + self.rank for i in range(per_rank))
        return [order[position % self.count] for position in dealt]


# The cache holds the present epoch and the next one. A shuffle of 100,000 indices takes 30 ms,
# which is too long for every step.
@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # random.Random instead of torch.randperm: no global generator changes, and the order is the
    # same under every release of torch.
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
