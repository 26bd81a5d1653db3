"""The Contender class, for our kernels and every peer, and the Problem that they compute."""

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
    """Raised by `prepare` if the library itself refuses a problem."""


@dataclass
class Problem:
    """A case with its pattern and inputs, and forms of its operands that contenders get for free.

    `inputs` holds the dense operands as training has them: token-major, with contiguous columns.
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
        """Inputs for a peer that needs contiguous rows; it gets them for free under "op" only."""
        return self.row_major if charge == OP else self.inputs

    @cached_property
    def flat(self) -> Tensor:
        """(nnz,) int64 positions of the entries in the row-major dense matrix."""
        return self.pattern.row_indices.long() * self.case.n + self.pattern.col_indices.long()

    @cached_property
    def sparse_csr(self) -> Tensor:
        """The sparse operand as torch.sparse_csr. MKL takes int32 indices without conversion."""
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
        """The sparse operand as a dense weight."""
        weight = torch.zeros(self.case.m * self.case.n, dtype=self.case.dtype, device=self.device)
        weight[self.flat] = self.inputs["values"]
        return weight.view(self.case.m, self.case.n)


@dataclass(frozen=True)
class Contender:
    """One way to compute an op.

    Attributes:
        op: the op it computes.
        name: its name in rows and plots: a kernel's name, or the peer's.
        backend: the peer's package, or the backend of our kernel.
        prepare: (problem, charge) -> a call without arguments that returns the op's result. The
            work of `prepare` is free; the work of the call is timed.
        reject: problem -> the reason why it cannot run, or None.
        devices: the devices that it exists on. On others it has no rows.
        token_major: whether it reads and writes token-major operands without conversion. Then "op"
            and "from_token_major" are the same call, timed once for both.
        mode: how the call is made: "no_grad" (no input requires grad), "grad", or "adapter" (the
            kernel is called without the op).
        serves: problem -> the row's `backend`. For "auto" this is the kernel that it selects.
        workspace: problem -> bytes that it says it allocates besides its result, or None.
        charges: the charges that it has rows for. Ops without activations have only "op".
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
        """A name that is unique among the contenders of a case."""
        return self.name if self.mode == "no_grad" else f"{self.name} [{self.mode}]"


def token_major(rows: Tensor) -> Tensor:
    """A contiguous (m, k) result, converted to token-major. Peers pay for this conversion."""
    return rows.t().contiguous().t()


@lru_cache(maxsize=64)
def _on_device(device: str, mask: str, m: int, n: int, density: float, seed: int) -> CsrPattern:
    """A pattern on a device, cached with its tile plan, which all cases of the mask share.

    A suite returns to its masks with other numbers of tokens. Drawing a mask of 14336 x 4096 takes
    three seconds; keeping one of 2 % takes 30 MB.
    """
    return masks.pattern_of(mask, m, n, density, seed).to(device)
