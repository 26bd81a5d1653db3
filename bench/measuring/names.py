"""Names in rows that several folders of the benchmarks share."""

from __future__ import annotations

import torch

# The kernel name of a call that leaves the choice to the library.
AUTO = "auto"
# Only these ops have activations, so only they can be charged for layout conversions.
PRODUCTS = ("sddmm", "spmm")
# The charges. OP times the op only; FROM_TOKEN_MAJOR includes the conversions that a peer needs
# from token-major operands.
OP, FROM_TOKEN_MAJOR = "op", "from_token_major"
DEVICES = frozenset({"cpu", "cuda"})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its prefix: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
