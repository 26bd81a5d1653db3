"""The fine-tuning methods. Each is a small frozen record of its parametrisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Method:
    """The branches that a method adds to a frozen linear layer, and which parts train.

    Formula: y = x (W + S)^T + (alpha / rank) x A^T B^T + bias.

    S is the sparse branch, and B A is the low-rank branch. A method has one, both or none.

    Attributes:
        name: the name that users give.
        summary: one line for a table.
        source: the paper that introduced the method.
        full: every parameter of the model trains, and no branch is added.
        low_rank: the layer has A (rank, n) and B (m, rank).
        sparse: the layer has S with a fixed mask.
        train_a: whether A trains. Otherwise A keeps its initial values.
        lr_b_ratio: B's learning rate divided by A's.
        sparse_lr: the default learning rate of S. 2e-4 is that of RoSA's authors. S on its own
            needs a higher one: docs/trainer.md has the measurements.
    """

    name: str
    summary: str
    source: str
    full: bool = False
    low_rank: bool = False
    sparse: bool = False
    train_a: bool = True
    lr_b_ratio: float = 1.0
    sparse_lr: float = 2e-4

    @property
    def trains_a(self) -> bool:
        """Whether A is among the trainable parameters."""
        return self.low_rank and self.train_a

    def rank_cost(self, m: int, n: int) -> int:
        """Trainable parameters per rank in an (m, n) layer: m for B, and n for A if it trains."""
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
                sparse_lr=2e-3,
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
    """The :class:`Method` of a name. A Method is returned unchanged.

    Raises:
        ValueError: the name is not in :data:`METHODS`.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]
