"""Unsafe native entries: call them through rosa_kernels.backends.native only."""

# (crow_indices address, col_indices address, rows, cols, nnz)
_Csr = tuple[int, int, int, int, int]
# (address, dtype, rows, cols, row stride, column stride), strides in elements
_Matrix = tuple[int, int, int, int, int, int]
# (address, dtype, size, stride)
_Vector = tuple[int, int, int, int]

def isa_available(isa: int) -> bool: ...
def sddmm_workspace_bytes(pattern: _Csr, k: int, dtype: int, threads: int, isa: int) -> int: ...
def spmm_workspace_bytes(pattern: _Csr, k: int, dtype: int, threads: int, isa: int) -> int: ...
def sddmm(
    pattern: _Csr, a: _Matrix, b: _Matrix, out: _Vector, workspace: int, threads: int, isa: int
) -> None: ...
def spmm(
    pattern: _Csr,
    values: _Vector,
    b: _Matrix,
    c: _Matrix,
    workspace: int,
    threads: int,
    isa: int,
) -> None: ...
def csr_add_(w: _Matrix, pattern: _Csr, values: _Vector, alpha: float, threads: int) -> None: ...
def csr_gather(w: _Matrix, pattern: _Csr, out: _Vector, threads: int) -> None: ...
def csr_transpose(pattern: _Csr, crow_t: int, col_t: int, permutation: int) -> None: ...
