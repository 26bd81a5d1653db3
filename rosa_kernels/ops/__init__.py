"""The ops. Each one validates, is declared to torch.library, and differentiates.

The route of ``rk.sddmm(pattern, a, b)`` from Python to the SIMD and CUDA kernels:

1. ``ops/sddmm.py``: ``sddmm`` validates with ``ops/_validate.py``, then calls ``rosa::sddmm``.
2. ``ops/_library.py`` declares ``rosa::sddmm``. If a or b requires grad, it runs inside ``_Sddmm``
   (``ops/sddmm.py``), whose backward calls ``rosa::spmm``.
3. ``ops/_dispatch.py``: ``run_product`` asks for a kernel, then runs it. No op names a backend.
4. ``choice.py`` chooses a ``Kernel`` (``kernel.py``) among those in ``registry.py``.
5. ``backends/native.py`` (CPU) or ``backends/native_cuda.py`` allocates, and passes addresses.
6. ``cpp/bindings/module.cpp``, the module ``_C``, makes views of them (``rosa/views.h``).
7. CPU: ``cpp/src/cpu/sddmm.cpp`` divides the work among threads. ``cpp/src/cpu/isa/sddmm.h`` is the
   kernel, compiled for each instruction set (``isa/avx512.cpp``, ``avx2.cpp``, ``portable.cpp``).
8. CUDA: ``cpp/src/cuda/sddmm.cu`` launches the kernels of ``pack.cuh`` and ``sddmm_*.cuh``.
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
