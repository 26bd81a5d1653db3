"""Names in rows and options that several folders of the benchmarks share.

Nothing here imports torch, which takes seconds: the command line needs these names for its help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The kernel name of a call that leaves the choice to the library.
AUTO = "auto"
# Only these ops have activations, so only they can be charged for layout conversions.
PRODUCTS = ("sddmm", "spmm")
OPS = (*PRODUCTS, "csr_add_", "csr_gather", "csr_scatter_")
LAYER_OPS = ("rosa_layer", "rosa_model")
# The charges. OP times the op only; FROM_TOKEN_MAJOR includes the conversions that a peer needs
# from token-major operands.
OP, FROM_TOKEN_MAJOR = "op", "from_token_major"
DEVICES = frozenset({"cpu", "cuda"})
# What a sample on CUDA contains. The first is the default.
DEVICE_TIMERS = ("cold", "hot", "graph")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its prefix: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
