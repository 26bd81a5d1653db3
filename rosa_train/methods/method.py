"""Fine-tuning methods, each a small frozen description of one parametrisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Method:
    """What a method adds to a frozen linear layer, and which parts of it train.

    Every method is one layer, y = x (W + S)^T + (alpha / rank) x A^T B^T + bias, with branches
    left out: B A is the low-rank branch, S the sparse one.

    Attributes:
        name: what a user calls it.
        summary: one line for a table.
        source: the paper it is from.
        full: every parameter of the model trains and no branch is added.
        low_rank: the layer has A (rank, n) and B (m, rank).
        sparse: the layer has S, of a fixed mask.
        train_a: A trains; where it does not, it stays as it was drawn.
        lr_b_ratio: B's learning rate over A's.
    """

    name: str
    summary: str
    source: str
    full: bool = False
    low_rank: bool = False
    sparse: bool = False
    train_a: bool = True
    lr_b_ratio: float = 1.0

    @property
    def trains_a(self) -> bool:
        """Whether A is among the trainable parameters."""
        return self.low_rank and self.train_a

    def rank_cost(self, m: int, n: int) -> int:
        """Trainable parameters that one rank costs in an (m, n) layer: m for B, n for A."""
        return m + n if self.trains_a else m


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "full",
                "every parameter of the model",
                "-",
                full=True,
            ),
            Method(
                "lora",
                "a low-rank update B A",
                "arXiv 2106.09685",
                low_rank=True,
            ),
            Method(
                "lora+",
                "LoRA whose B learns 16 times as fast as its A",
                "arXiv 2402.12354",
                low_rank=True,
                lr_b_ratio=16.0,
            ),
            Method(
                "spa",
                "a sparse update S on a fixed mask",
                "arXiv 2401.04679",
                sparse=True,
            ),
            Method(
                "rosa",
                "a sparse plus a low-rank update, S + B A",
                "arXiv 2401.04679",
                low_rank=True,
                sparse=True,
            ),
        )
    }
)


def method_named(method: str | Method) -> Method:
    """The :class:`Method` of a name; a Method is handed back as it is.

    Raises:
        ValueError: a name that is not in :data:`METHODS`.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]
