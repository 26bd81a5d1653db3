"""The Parametrization that a contender adds to a weight, and the initial numbers, shared by all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern

from .. import masks

ALPHA = 16.0


def rosa_nnz(m: int, n: int, rank: int) -> int:
    """The number of entries of S: the budget that the low-rank half leaves."""
    return (rank - rank // 2) * (m + n)


@dataclass(frozen=True)
class Parametrization:
    """What a contender adds to one weight, S + scaling B A, and which parts of it are trained.

    Attributes:
        trains: names among "weight", "a", "b", "values".
        a: (r, n). With a `selector` (r,), its rows are those rows of the identity.
    """

    trains: tuple[str, ...] = ()
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0
    pattern: CsrPattern | None = None
    values: Tensor | None = None
    selector: Tensor | None = None

    @property
    def nnz(self) -> int:
        return 0 if self.values is None else self.values.numel()

    @property
    def rank(self) -> int:
        return 0 if self.b is None else self.b.shape[1]

    def trainable(self, shape: tuple[int, int]) -> int:
        """The number of trained parameters in a layer of this shape."""
        count = 0
        for name in self.trains:
            tensor = {"a": self.a, "b": self.b, "values": self.values}.get(name)
            count += shape[0] * shape[1] if tensor is None else tensor.numel()
        return count

    def delta(self) -> Tensor | float:
        """S + scaling B A, dense and in float64."""
        delta: Tensor | float = 0.0
        if self.a is not None and self.b is not None:
            delta = self.scaling * (self.b.double() @ self.a.double())
        if self.pattern is not None and self.values is not None:
            sparse = torch.zeros(self.pattern.shape, dtype=torch.float64, device=self.values.device)
            sparse[self.pattern.row_indices.long(), self.pattern.col_indices.long()] = (
                self.values.double()
            )
            delta = sparse + delta
        return delta

    def initialize(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Set parameters to these numbers, in float32 whatever the weight's dtype."""
        with torch.no_grad():
            for part, parameter in trained.items():
                number: Tensor = getattr(self, part)
                parameter.data = number.to(parameter.device, torch.float32).clone()

    def updated(self, trained: Mapping[str, Tensor]) -> Parametrization:
        """The same parametrization with a contender's current numbers."""
        return replace(
            self,
            a=trained["a"].detach() if "a" in trained else self.a,
            b=trained["b"].detach() if "b" in trained else self.b,
            values=trained["values"].detach() if "values" in trained else self.values,
        )


class TooFewEntries(ValueError):
    """A mask has fewer entries than the budget asks for."""


@dataclass
class LayerSpec:
    """One layer's frozen weight, and the initial numbers of its adapters."""

    weight: Tensor
    mask: str
    rank: int
    seed: int

    def parametrization(self, kind: str) -> Parametrization:
        """The parametrization of a kind: "frozen", "full", "lora", "rosa", "sparse" or "cla".

        Raises:
            TooFewEntries: the mask has too few entries.
        """
        if kind in ("frozen", "full"):
            return Parametrization(trains=("weight",) if kind == "full" else ())
        m, n = self.weight.shape
        if kind == "sparse":
            pattern = self.pattern(self.rank * (m + n))
            return Parametrization(("values",), pattern=pattern, values=self._values(pattern))
        if kind == "cla":
            rank = min(self.rank * (m + n) // m, n)
            selector = torch.arange(rank, device=self.weight.device)
            a = torch.eye(rank, n, device=self.weight.device)
            b = self._normal(m, rank, 2) / rank**0.5
            return Parametrization(("b",), a, b, ALPHA / rank, selector=selector)
        rank = self.rank if kind == "lora" else self.rank // 2
        # W's entries are about 1 / sqrt(n). With these scales the low-rank branch has an effect of
        # the same size.
        a, b = self._normal(rank, n, 1) / n**0.5, self._normal(m, rank, 2) / (ALPHA / rank**0.5)
        low = Parametrization(("a", "b"), a, b, ALPHA / rank)
        if kind == "lora":
            return low
        pattern = self.pattern(rosa_nnz(m, n, self.rank))
        trains = ("a", "b", "values")
        return replace(low, trains=trains, pattern=pattern, values=self._values(pattern))

    def pattern(self, nnz: int) -> CsrPattern:
        """The mask with exactly `nnz` entries. If it has more, some are left out at random."""
        m, n = self.weight.shape
        pattern = masks.pattern_of(self.mask, m, n, min(nnz / (m * n), 1.0), self.seed)
        if pattern.nnz < nnz:
            raise TooFewEntries(f"{self.mask} has {pattern.nnz} entries; the budget asks for {nnz}")
        if pattern.nnz > nnz:
            generator = torch.Generator().manual_seed(self.seed)
            kept = torch.randperm(pattern.nnz, generator=generator)[:nnz].sort().values
            rows, cols = pattern.row_indices[kept], pattern.col_indices[kept]
            pattern = CsrPattern.from_coo(rows, cols, (m, n))
        return pattern.to(self.weight.device)

    def _values(self, pattern: CsrPattern) -> Tensor:
        return self._normal(1, pattern.nnz, 3)[0] / math.sqrt(self.weight.shape[1])

    def _normal(self, rows: int, cols: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(4 * self.seed + stream)
        drawn: Tensor = torch.randn(rows, cols, generator=generator)
        return drawn.to(self.weight.device)
