"""The ops: validate, declare to torch.library, differentiate. No op knows a backend's name.

The route of one op, ``rk.sddmm(pattern, a, b)``, from Python to SIMD and CUDA:

1. ``ops/sddmm.py``: ``sddmm`` validates its arguments (``_validate``) and calls ``rosa::sddmm``.
2. ``ops/_library.py`` declares that op; with grad it goes through ``_Sddmm``, whose backward calls
   ``rosa::spmm``.
3. ``ops/_dispatch.py``: ``run_product`` asks for a kernel and runs it.
4. ``choice.py`` finds it, among what ``registry.py`` knows; ``kernel.py`` says what a kernel is.
5. ``backends/native.py`` (CPU) or ``native_cuda.py`` allocates and hands addresses to ``_C``.
6. ``cpp/bindings/module.cpp`` makes views of them (``rosa/views.h``).
7. ``cpp/src/cpu/sddmm.cpp`` shares out the work; ``cpp/src/cpu/isa/sddmm.h`` does it, compiled for
   each instruction set.
8. ``cpp/src/cuda/sddmm.cu`` launches the kernels of ``pack.cuh`` and ``sddmm_*.cuh``.
"""

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
