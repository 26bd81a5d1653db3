"""What rows call things: one place for the words that several rooms share."""

from __future__ import annotations

import torch

# The kernel that a user gets who asks for none.
AUTO = "auto"
# Only these ops have activations, and so a layout that conversions are charged for.
PRODUCTS = ("sddmm", "spmm")
# What is timed: the op alone, or with the conversions that a peer needs from token-major operands.
OP, FROM_TOKEN_MAJOR = "op", "from_token_major"
DEVICES = frozenset({"cpu", "cuda"})


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
