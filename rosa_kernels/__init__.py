"""rosa-kernels: sparse kernels for sparse + low-rank fine-tuning, as PyTorch ops."""

# torch is imported first: it loads its OpenMP runtime, and _C must share that pool. Two pools
# compete for the cores and run 5x slower.
import torch  # noqa: F401  isort: skip

from rosa_kernels import backends as _backends  # this registers the kernels  # noqa: F401
from rosa_kernels import nn
from rosa_kernels.explain import Explanation, explain
from rosa_kernels.kernel import Kernel
from rosa_kernels.nn import RosaLinear
from rosa_kernels.ops import (
    csr_add,
    csr_add_,
    csr_gather,
    csr_scatter_,
    csr_transpose,
    rosa_linear,
    sddmm,
    spmm,
)
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.registry import kernels, register, use_backend
from rosa_kernels.tile_plan import TilePlan

__version__ = "0.1.0"

__all__ = [
    "CsrPattern",
    "Explanation",
    "Kernel",
    "RosaLinear",
    "TilePlan",
    "csr_add",
    "csr_add_",
    "csr_gather",
    "csr_scatter_",
    "csr_transpose",
    "explain",
    "kernels",
    "nn",
    "register",
    "rosa_linear",
    "sddmm",
    "spmm",
    "use_backend",
]
