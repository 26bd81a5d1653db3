"""The ops: validate, declare to torch.library, differentiate. No op knows a backend's name."""

from rosa_kernels.ops.csr_add import csr_add, csr_add_
from rosa_kernels.ops.csr_gather import csr_gather
from rosa_kernels.ops.csr_scatter import csr_scatter_
from rosa_kernels.ops.csr_transpose import csr_transpose
from rosa_kernels.ops.rosa_linear import rosa_linear
from rosa_kernels.ops.sddmm import sddmm
from rosa_kernels.ops.spmm import spmm

__all__ = [
    "csr_add",
    "csr_add_",
    "csr_gather",
    "csr_scatter_",
    "csr_transpose",
    "rosa_linear",
    "sddmm",
    "spmm",
]
