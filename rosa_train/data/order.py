"""Which examples a step sees."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchOrder:
    """Which of ``count`` examples are in which batch, as a function of the step alone.

    Every epoch is a fresh shuffle by (seed, epoch) and nothing else, no state is carried, so that
    a run resumes at any step. Step ``s`` of an epoch takes the next ``batch_size * world`` of the
    shuffle and deals them out to the ranks in turn. The last step of an epoch takes what is left,
    in equal numbers: short of a multiple of ``world``, the epoch's first examples fill it up,
    ``world - 1`` at most. So every example comes once an epoch, exactly once if ``world`` divides
    ``count`` (as 1 does), and no rank waits for another.

    Raises:
        ValueError: count, batch_size or world below 1, or a rank outside [0, world).
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
        return -(-self.count // (self.batch_size * self.world))

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step of the whole run falls into."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """This rank's examples at ``step``, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"BatchOrder: expected step >= 0, got {step}")
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _shuffled(self.count, self.seed, epoch)
        start = step * self.batch_size * self.world
        stop = min(start + self.batch_size * self.world, self.count)
        per_rank = -(-(stop - start) // self.world)
        dealt = (start + i * self.world + self.rank for i in range(per_rank))
        return [order[position % self.count] for position in dealt]


# Two: the epoch at hand, and the one a caller looks ahead to. 100,000 indices take 30 ms to
# shuffle, too long for every step.
@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # random.Random, not torch.randperm: no other generator is touched, and a run resumed under
    # another release of torch goes on in the same order.
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
