"""cuSPARSE's generic API by ctypes, on the copy that torch has loaded.

nvmath-python and CuPy bind the same functions, but machines with torch often have neither.
Constants and signatures are those of cusparse.h 12.x, which CUDA 12 and 13 ship.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
COL, ROW = 1, 2  # cusparseOrder_t
DEFAULT, CSR_ALG2, CSR_ALG3 = 0, 6, 12  # cusparseSpMMAlg_t
_INT32, _BASE_ZERO, _AS_IT_IS = 2, 0, 0  # index type, index base, cusparseOperation_t
_FLOAT32 = DATA_TYPES[torch.float32]  # the compute type of all products

_PRODUCT = (c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int)
_SIGNATURES = {
    "cusparseCreate": (POINTER(c_void_p),),
    "cusparseGetVersion": (c_void_p, POINTER(c_int)),
    "cusparseSetStream": (c_void_p, c_void_p),
    "cusparseCreateCsr": (POINTER(c_void_p), *[c_int64] * 3, *[c_void_p] * 3, *[c_int] * 4),
    "cusparseDestroySpMat": (c_void_p,),
    "cusparseCreateDnMat": (POINTER(c_void_p), *[c_int64] * 3, c_void_p, c_int, c_int),
    "cusparseDnMatSetValues": (c_void_p, c_void_p),
    "cusparseDestroyDnMat": (c_void_p,),
    **{
        f"cusparse{op}{step}": (*_PRODUCT, POINTER(c_size_t) if step == "_bufferSize" else c_void_p)
        for op in ("SpMM", "SDDMM")
        for step in ("_bufferSize", "_preprocess", "")
    },
}
_NAMES = ("libcusparse.so.12", "libcusparse.so.13", "libcusparse.so")


# Statuses of a refusal: invalid value, architecture mismatch, matrix type not supported, not
# supported. All other statuses are faults.
_UNSUPPORTED = (3, 4, 8, 10)


class CusparseError(RuntimeError):
    """A cuSPARSE call failed; the message is cuSPARSE's own."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.unsupported = status in _UNSUPPORTED


class Library:
    """A loaded cuSPARSE with one handle, for the current device."""

    def __init__(self, shared: ctypes.CDLL) -> None:
        self._shared = shared
        for name, arguments in _SIGNATURES.items():
            function = getattr(shared, name)
            function.argtypes, function.restype = arguments, c_int
        shared.cusparseGetErrorString.argtypes = (c_int,)
        shared.cusparseGetErrorString.restype = c_char_p
        self.handle = c_void_p()
        self.call("cusparseCreate", byref(self.handle))
        version = c_int()
        self.call("cusparseGetVersion", self.handle, byref(version))
        self.version = f"{version.value // 1000}.{version.value // 100 % 10}.{version.value % 100}"

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            CusparseError: it returns another status than success.
        """
        status = getattr(self._shared, name)(*arguments)
        if status != 0:
            text = self._shared.cusparseGetErrorString(status).decode()
            raise CusparseError(f"{name} returned {status}: {text}", status)


@cache
def library() -> Library | str:
    """The library, or the reason why there is none."""
    reasons = []
    for name in (*_loaded(), *_NAMES):
        try:
            return Library(ctypes.CDLL(name))
        except (OSError, AttributeError, CusparseError) as error:
            reasons.append(str(error))
    return f"cuSPARSE was not found: {reasons[0]}"


def _loaded() -> list[str]:
    """Paths of the copy in this process. A second copy could be another version than torch's."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    return sorted(path for path in paths if "/libcusparse.so" in path)


class _Described:
    """A descriptor that is destroyed with its owner."""

    def __init__(self, lib: Library, create: str, destroy: str, *arguments: object) -> None:
        self.descriptor = c_void_p()
        lib.call(create, byref(self.descriptor), *arguments)
        # Nothing is destroyed at exit, because the device may be gone already.
        weakref.finalize(self, lib.call, destroy, self.descriptor).atexit = False


class Matrix(_Described):
    """A dense matrix. `at` points the descriptor at other memory of the same shape."""

    def __init__(self, lib: Library, rows: int, cols: int, order: int, x: Tensor) -> None:
        size = (rows, cols, cols if order == ROW else rows)
        data = (x.data_ptr(), DATA_TYPES[x.dtype], order)
        super().__init__(lib, "cusparseCreateDnMat", "cusparseDestroyDnMat", *size, *data)
        self._lib, self._memory = lib, x

    def at(self, x: Tensor) -> None:
        """Point the descriptor at `x`."""
        self._lib.call("cusparseDnMatSetValues", self.descriptor, x.data_ptr())
        self._memory = x


class Csr(_Described):
    """A CSR matrix with 32-bit indices."""

    def __init__(
        self, lib: Library, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> None:
        data = (x.data_ptr() for x in (crow, col, values))
        kinds = (_INT32, _INT32, _BASE_ZERO, DATA_TYPES[values.dtype])
        super().__init__(
            lib, "cusparseCreateCsr", "cusparseDestroySpMat", *shape, col.numel(), *data, *kinds
        )
        self._memory = (crow, col, values)


class Product:
    """SpMM or SDDMM on three described operands. Its buffer is allocated and preprocessed.

    Attributes:
        workspace_bytes: the size of the buffer, which all calls share.
    """

    def __init__(
        self,
        lib: Library,
        op: str,
        operands: tuple[Matrix | Csr, Matrix | Csr, Matrix | Csr],
        algorithm: int,
        device: torch.device,
    ) -> None:
        self._lib, self._op, self._operands = lib, op, operands
        a, b, c = (operand.descriptor for operand in operands)
        # Every call reads these host scalars, so they must stay alive.
        self._scalars = c_float(1.0), c_float(0.0)
        alpha, beta = (ctypes.cast(byref(x), c_void_p) for x in self._scalars)
        as_is = (_AS_IT_IS, _AS_IT_IS)
        self._arguments = (lib.handle, *as_is, alpha, a, b, beta, c, _FLOAT32, algorithm)
        lib.call("cusparseSetStream", lib.handle, torch.cuda.current_stream().cuda_stream or None)
        size = c_size_t()
        lib.call(f"cusparse{op}_bufferSize", *self._arguments, byref(size))
        self.workspace_bytes = size.value
        self._buffer = torch.empty(max(size.value, 1), dtype=torch.uint8, device=device)
        lib.call(f"cusparse{op}_preprocess", *self._arguments, self._buffer.data_ptr())

    def __call__(self) -> None:
        """Compute the third operand."""
        self._lib.call(f"cusparse{self._op}", *self._arguments, self._buffer.data_ptr())
