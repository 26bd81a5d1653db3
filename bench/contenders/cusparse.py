"""cuSPARSE, called directly, in every dtype it takes.

If cuSPARSE refuses a dtype, its message is the reason. Its fastest layout is row-major; SDDMM needs
contiguous rows of both operands. SpMM also reads and writes token-major operands without
conversion, as column-major matrices ("-tokens"). Descriptors, buffers and preprocessing are made
once. SDDMM has no bfloat16. A caller with 16-bit operands can do what "-fp32" does: upcast them
while they are transposed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..measuring.names import OP
from . import cusparse_api as api
from .base import Contender, Problem, Run, Unsupported, token_major

_CUDA = frozenset({"cuda"})


class _Call:
    """A prepared call, and the size of the buffer that it holds besides its operands."""

    def __init__(self, run: Run, product: api.Product) -> None:
        self._run, self.workspace_bytes = run, product.workspace_bytes

    def __call__(self) -> Tensor:
        return self._run()


def _library() -> api.Library:
    found = api.library()
    if isinstance(found, str):
        raise Unsupported(found)
    return found


def _reject(problem: Problem) -> str | None:
    found = api.library()
    if isinstance(found, str):
        return found
    if problem.case.dtype not in api.DATA_TYPES:
        return f"is measured in float32, float16 and bfloat16, got {problem.case.dtype}"
    return None


def _reject_fp32(problem: Problem) -> str | None:
    if problem.case.dtype == torch.float32:
        return "not run: float32 operands need no conversion, see cusparse"
    return _reject(problem)


def _serves(problem: Problem) -> str:
    found = api.library()
    return "cusparse" if isinstance(found, str) else f"cusparse {found.version}"


def _spmm(algorithm: int, order: int) -> Callable[[Problem, str], Run]:
    def prepare(problem: Problem, charge: str) -> Run:
        lib, case, pattern = _library(), problem.case, problem.pattern
        rows = order == api.ROW
        source = problem.row_major["b"] if rows else problem.inputs["b"]

        def output() -> Tensor:
            if rows:
                return source.new_empty(case.m, case.k)
            return source.new_empty(case.k, case.m).t()

        values = problem.inputs["values"]
        s = api.Csr(lib, pattern.crow_indices, pattern.col_indices, values, pattern.shape)
        b = api.Matrix(lib, case.n, case.k, order, source)
        c = api.Matrix(lib, case.m, case.k, order, output())
        product = _product(lib, "SpMM", (s, b, c), algorithm, problem)
        convert = rows and charge != OP

        def run() -> Tensor:
            if convert:
                b.at(problem.inputs["b"].contiguous())
            out = output()
            c.at(out)
            product()
            return token_major(out) if convert else out

        return _Call(run, product)

    return prepare


def _sddmm(dtype: torch.dtype | None) -> Callable[[Problem, str], Run]:
    """SDDMM in the operands' dtype (None), or in a dtype that they are converted to."""

    def prepare(problem: Problem, charge: str) -> Run:
        lib, case = _library(), problem.case
        wanted = dtype or case.dtype
        x = {name: operand.to(wanted) for name, operand in problem.row_major.items()}
        a = api.Matrix(lib, case.m, case.k, api.ROW, x["a"])
        b = api.Matrix(lib, case.k, case.n, api.COL, x["b"])  # (n, k) row-major, transposed
        product, values = _sampled(lib, problem, a, b, wanted)

        def run() -> Tensor:
            if charge != OP:
                for descriptor, name in ((a, "a"), (b, "b")):
                    source = problem.inputs[name]
                    rows = torch.empty(source.shape, dtype=wanted, device=source.device)
                    descriptor.at(rows.copy_(source))  # transposes and converts in one pass
            product()
            return values

        return _Call(run, product)

    return prepare


def _sampled(
    lib: api.Library, problem: Problem, a: api.Matrix, b: api.Matrix, dtype: torch.dtype
) -> tuple[api.Product, Tensor]:
    """The SDDMM and its result, in the operands' dtype, or in float32 if cuSPARSE refuses that.

    The result is allocated once and zeroed: a NaN in it might survive the product with beta = 0.
    """
    pattern = problem.pattern
    refused: Unsupported | None = None
    for out in dict.fromkeys((dtype, torch.float32)):
        values = torch.zeros(pattern.nnz, dtype=out, device=problem.device)
        s = api.Csr(lib, pattern.crow_indices, pattern.col_indices, values, pattern.shape)
        try:
            return _product(lib, "SDDMM", (a, b, s), api.DEFAULT, problem), values
        except Unsupported as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _product(
    lib: api.Library,
    op: str,
    operands: tuple[api.Matrix | api.Csr, api.Matrix | api.Csr, api.Matrix | api.Csr],
    algorithm: int,
    problem: Problem,
) -> api.Product:
    """The product, after one call: some refusals come only from the call itself."""
    try:
        product = api.Product(lib, op, operands, algorithm, problem.pattern.device)
        product()
    except api.CusparseError as error:
        if error.unsupported:
            raise Unsupported(str(error)) from error
        raise
    return product


CONTENDERS = tuple(
    Contender(
        op,
        name,
        "cusparse",
        prepare,
        reject,
        _CUDA,
        token_major=name.endswith("-tokens"),
        serves=_serves,
    )
    for op, name, prepare, reject in (
        ("spmm", "cusparse", _spmm(api.DEFAULT, api.ROW), _reject),
        ("spmm", "cusparse-alg2", _spmm(api.CSR_ALG2, api.ROW), _reject),
        ("spmm", "cusparse-alg3", _spmm(api.CSR_ALG3, api.ROW), _reject),
        ("spmm", "cusparse-tokens", _spmm(api.DEFAULT, api.COL), _reject),
        ("sddmm", "cusparse", _sddmm(None), _reject),
        ("sddmm", "cusparse-fp32", _sddmm(torch.float32), _reject_fp32),
    )
)
