"""What competes in a case: one declaration for our kernels and for every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from rosa_kernels import CsrPattern
from rosa_kernels.testing import Case, make_inputs

from .. import masks
from ..measuring.names import DEVICES, FROM_TOKEN_MAJOR, OP

Run = Callable[[], Tensor]


class Unsupported(RuntimeError):
    """What `prepare` raises where only the library itself can tell that it cannot."""


@dataclass
class Problem:
    """A case made concrete, and forms of its operands that contenders may have for free.

    `inputs` holds the dense operands as training has them: token-major, the columns contiguous.
    """

    case: Case
    device: str
    pattern: CsrPattern
    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Problem:
        """Build the pattern and the inputs of `case`."""
        mask = (case.mask, case.m, case.n, case.density, case.seed)
        pattern = masks.pattern_of(*mask) if device == "cpu" else _on_device(device, *mask)
        return cls(case, device, pattern, make_inputs(case, pattern, device))

    @cached_property
    def row_major(self) -> dict[str, Tensor]:
        """The inputs with contiguous rows, the layout most sparse libraries want."""
        return {name: tensor.contiguous() for name, tensor in self.inputs.items()}

    def operands(self, charge: str) -> dict[str, Tensor]:
        """Inputs for a peer that wants rows: for free where only the op is charged."""
        return self.row_major if charge == OP else self.inputs

    @cached_property
    def flat(self) -> Tensor:
        """(nnz,) int64 positions of the entries in the row-major dense matrix."""
        return self.pattern.row_indices.long() * self.case.n + self.pattern.col_indices.long()

    @cached_property
    def sparse_csr(self) -> Tensor:
        """The sparse operand as torch.sparse_csr; MKL takes int32 indices as they are."""
        values = self.inputs.get("values")
        if values is None:
            dtype = next(iter(self.inputs.values())).dtype
            values = torch.ones(self.pattern.nnz, dtype=dtype, device=self.device)
        return torch.sparse_csr_tensor(
            self.pattern.crow_indices,
            self.pattern.col_indices,
            values,
            size=self.pattern.shape,
            check_invariants=False,
        )

    @cached_property
    def dense(self) -> Tensor:
        """The sparse operand written out as a dense weight."""
        weight = torch.zeros(self.case.m * self.case.n, dtype=self.case.dtype, device=self.device)
        weight[self.flat] = self.inputs["values"]
        return weight.view(self.case.m, self.case.n)


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        op: the op it computes.
        name: what rows and plots call it: a kernel's name, or the peer's.
        backend: the peer's package, or who provides our kernel.
        prepare: (problem, charge) -> a call without arguments that returns the op's result. What
            `prepare` does is free; what the call does is timed.
        reject: why it cannot run on a problem, or None.
        devices: where it exists at all; elsewhere it has no rows.
        token_major: it reads and writes token-major operands as they lie. Then "op" and
            "from_token_major" are the same call, timed once for both.
        mode: how the call is made: "no_grad" (no input requires grad), "grad", or "adapter" (past
            the op, straight to the kernel).
        serves: what really computes, for the row: "auto" answers with the kernel it takes.
        workspace: bytes it says it allocates beside its result, or None where it does not say.
        charges: which rows it gets; ops without activations have no layout to convert from.
    """

    op: str
    name: str
    backend: str
    prepare: Callable[[Problem, str], Run] = field(repr=False)
    reject: Callable[[Problem], str | None] = field(repr=False, default=lambda problem: None)
    devices: frozenset[str] = DEVICES
    token_major: bool = False
    mode: str = "no_grad"
    serves: Callable[[Problem], str] | None = field(repr=False, default=None)
    workspace: Callable[[Problem], int | None] = field(repr=False, default=lambda problem: None)
    charges: tuple[str, ...] = (OP, FROM_TOKEN_MAJOR)

    @property
    def label(self) -> str:
        """Unique among the contenders of a case."""
        return self.name if self.mode == "no_grad" else f"{self.name} [{self.mode}]"


def token_major(rows: Tensor) -> Tensor:
    """A contiguous (m, k) result brought back to token-major: what a peer's output costs."""
    return rows.t().contiguous().t()


@lru_cache(maxsize=64)
def _on_device(device: str, mask: str, m: int, n: int, density: float, seed: int) -> CsrPattern:
    """Kept with what kernels derive from it: all cases of a mask share one tile plan.

    A suite comes back to its masks with other numbers of tokens; drawing one of 14336 x 4096 takes
    three seconds, keeping one of 2 % takes 30 MB.
    """
    return masks.pattern_of(mask, m, n, density, seed).to(device)
