"""Unsafe native functions: call them only through the adapters in rosa_kernels.backends."""

# (crow_indices address, col_indices address, rows, cols, nnz)
_Csr = tuple[int, int, int, int, int]
# (address, dtype, rows, cols, row stride, column stride). Strides count elements.
_Matrix = tuple[int, int, int, int, int, int]
# (address, dtype, size, stride). The stride counts elements.
_Vector = tuple[int, int, int, int]
# (header address, header size, blob address, blob size). Sizes count integers. () is no plan.
_Plan = tuple[int, int, int, int] | tuple[()]

class TilePlan:
    @property
    def header(self) -> list[int]: ...
    @property
    def blob_size(self) -> int: ...
    def copy_blob(self, to: int) -> None: ...

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
def csr_scatter_(w: _Matrix, pattern: _Csr, values: _Vector, threads: int) -> None: ...
def csr_transpose(pattern: _Csr, crow_t: int, col_t: int, permutation: int) -> None: ...
def tile_plan(pattern: _Csr, tile_rows: int, tile_cols: int, heavy_fill: float) -> TilePlan: ...

# The functions below exist only in a build with CUDA kernels.
def cuda_unavailable() -> str: ...
def cuda_unsupported(device: int) -> str: ...
def cuda_has_wgmma() -> bool: ...

# (multiprocessors, major, minor, bytes of L2, bytes of shared memory that a block may use)
def cuda_properties(device: int) -> tuple[int, int, int, int, int]: ...
def cuda_sddmm_shared_bytes(variant: int, tile_cols: int, device: int) -> int: ...
def cuda_spmm_shared_bytes(variant: int) -> int: ...
def cuda_sddmm_workspace_bytes(
    variant: int, pattern: _Csr, plan: _Plan, a: _Matrix, b: _Matrix, device: int
) -> int: ...
def cuda_spmm_workspace_bytes(
    variant: int, pattern: _Csr, plan: _Plan, b: _Matrix, c: _Matrix, device: int
) -> int: ...
def cuda_sddmm(
    variant: int,
    pattern: _Csr,
    plan: _Plan,
    a: _Matrix,
    b: _Matrix,
    out: _Vector,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_spmm(
    variant: int,
    pattern: _Csr,
    plan: _Plan,
    values: _Vector,
    b: _Matrix,
    c: _Matrix,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_csr_add_(
    w: _Matrix, pattern: _Csr, values: _Vector, alpha: float, device: int, stream: int
) -> None: ...
def cuda_csr_gather(w: _Matrix, pattern: _Csr, out: _Vector, device: int, stream: int) -> None: ...
def cuda_csr_scatter_(
    w: _Matrix, pattern: _Csr, values: _Vector, device: int, stream: int
) -> None: ...

# Only benchmarks call the functions below.
def cuda_sputnik_style_sddmm(
    pattern: _Csr,
    row_swizzle: int,
    grid_rows: int,
    grid_entries: int,
    a: _Matrix,
    b: _Matrix,
    out: _Vector,
    device: int,
    stream: int,
) -> None: ...
def cuda_sputnik_style_spmm(
    pattern: _Csr,
    row_swizzle: int,
    values: _Vector,
    b: _Matrix,
    c: _Matrix,
    device: int,
    stream: int,
) -> None: ...
def cuda_read_bandwidth(
    data: int, bytes: int, passes: int, blocks: int, sink: int, device: int, stream: int
) -> None: ...
def cuda_launch_empty(count: int, device: int, stream: int) -> None: ...
