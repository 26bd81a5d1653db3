"""The cuSPARSE peer, with a stand-in for the library that computes on CPU memory.

The stand-in is called through C function pointers of the declared signatures. It refuses what
cuSPARSE refuses. So these tests show that shapes, layouts, dtypes and lifetimes are right. They do
not test cuSPARSE itself.
"""

from __future__ import annotations

import ctypes
import gc
from ctypes import CFUNCTYPE, POINTER, c_char, c_float, c_int
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numpy")

from bench_cases import FAST, small_case

from bench.contenders import cusparse
from bench.contenders import cusparse_api as api
from bench.contenders.base import Problem
from bench.measuring.names import FROM_TOKEN_MAJOR, OP
from bench.run import runner
from rosa_kernels.testing import Case

SUCCESS, EXECUTION_FAILED, NOT_SUPPORTED = 0, 6, 10
DTYPES = {code: dtype for dtype, code in api.DATA_TYPES.items()}


def memory(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    buffer = (c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype)


class Dense(SimpleNamespace):
    def matrix(self) -> torch.Tensor:
        """A view of the elements in the caller's memory."""
        flat = memory(self.values, self.rows * self.cols, DTYPES[self.type])
        if self.order == api.ROW:
            assert self.ld == self.cols
            return flat.view(self.rows, self.cols)
        assert (self.order, self.ld) == (api.COL, self.rows)
        return flat.view(self.cols, self.rows).t()


class Sparse(SimpleNamespace):
    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        crow = memory(self.crow, self.rows + 1, torch.int32).long()
        rows = torch.repeat_interleave(torch.arange(self.rows), crow.diff())
        return rows, memory(self.col, self.nnz, torch.int32).long()

    def entries(self) -> torch.Tensor:
        return memory(self.values, self.nnz, DTYPES[self.type])


class StandIn:
    """The part of libcusparse that the peer calls."""

    def __init__(self) -> None:
        self.alive: dict[int, Dense | Sparse] = {}
        self.log: list[str] = []
        self._made = 0
        for name, signature in api._SIGNATURES.items():
            body = getattr(self, "_" + name.removeprefix("cusparse"), None)
            if body is None:
                op, _, step = name.removeprefix("cusparse").partition("_")
                body = getattr(self, f"_{step or 'run'}")(op)
            setattr(self, name, CFUNCTYPE(c_int, *signature)(body))

        def text(status: int) -> bytes:
            return {NOT_SUPPORTED: b"the operation is not supported"}.get(status, b"it failed")

        self.cusparseGetErrorString = text

    def _new(self, into, thing: Dense | Sparse) -> int:
        self._made += 1
        self.alive[self._made] = thing
        into[0] = self._made
        return SUCCESS

    def _Create(self, handle) -> int:
        handle[0] = 77
        return SUCCESS

    def _GetVersion(self, handle, version) -> int:
        version[0] = 12604
        return SUCCESS

    def _SetStream(self, handle, stream) -> int:
        assert handle == 77
        return SUCCESS

    def _CreateCsr(self, into, rows, cols, nnz, crow, col, values, *kinds) -> int:
        assert kinds[:3] == (2, 2, 0)  # 32-bit indices from zero
        sizes = {"rows": rows, "cols": cols, "nnz": nnz}
        arrays = {"crow": crow, "col": col, "values": values}
        return self._new(into, Sparse(**sizes, **arrays, type=kinds[3]))

    def _CreateDnMat(self, into, rows, cols, ld, values, kind, order) -> int:
        what = {"rows": rows, "cols": cols, "ld": ld, "values": values}
        return self._new(into, Dense(**what, type=kind, order=order))

    def _DnMatSetValues(self, matrix, values) -> int:
        self.alive[matrix].values = values
        return SUCCESS

    def _DestroySpMat(self, matrix) -> int:
        del self.alive[matrix]
        return SUCCESS

    _DestroyDnMat = _DestroySpMat

    def _bufferSize(self, op: str):
        def body(*arguments) -> int:
            arguments[-1][0] = 48
            return self._supports(op, arguments)

        return body

    def _preprocess(self, op: str):
        return lambda *arguments: self._supports(op, arguments)

    def _run(self, op: str):
        def body(handle, op_a, op_b, alpha, a, b, beta, c, compute, algorithm, buffer) -> int:
            scalars = [ctypes.cast(x, POINTER(c_float))[0] for x in (alpha, beta)]
            assert (handle, op_a, op_b, compute, *scalars) == (77, 0, 0, 0, 1.0, 0.0)
            assert buffer
            self.log.append(f"{op} {algorithm}")
            a, b, c = self.alive[a], self.alive[b], self.alive[c]
            if op == "SpMM":
                s = torch.zeros(a.rows, a.cols, dtype=torch.float64)
                s[a.indices()] = a.entries().double()
                c.matrix().copy_(s @ b.matrix().double())
            else:
                rows, cols = c.indices()
                left, right = a.matrix().double()[rows], b.matrix().double().t()[cols]
                c.entries().copy_((left * right).sum(1))
            return SUCCESS

        return body

    def _supports(self, op: str, arguments) -> int:
        a, c = self.alive[arguments[4]], self.alive[arguments[7]]
        kinds = DTYPES[a.type], DTYPES[c.type]
        if op == "SDDMM" and kinds != (torch.float32,) * 2:
            # As documented for float16 operands. The stand-in takes only float32 results of them.
            return SUCCESS if kinds == (torch.float16, torch.float32) else NOT_SUPPORTED
        return SUCCESS


@pytest.fixture
def library(monkeypatch) -> StandIn:
    shared = StandIn()
    loaded = api.Library(shared)
    monkeypatch.setattr(api, "library", lambda: loaded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return shared


def rows_of(case: Case) -> dict[tuple[str, str], dict]:
    competing = [c for c in cusparse.CONTENDERS if c.op == case.op]
    rows = runner.run_case(case, competing, FAST)
    return {(row["kernel"], row["charge"]): row for row in rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 9])
def test_spmm_in_every_layout_and_algorithm(library, dtype, k):
    rows = rows_of(small_case("spmm", k, dtype))
    assert len(rows) == 8
    for (kernel, charge), row in rows.items():
        assert row["status"] == "ok", (kernel, charge, row["reason"])
        assert row["backend"] == "cusparse 12.6.4"
        assert row["workspace_bytes"] == 48
    assert {"SpMM 0", "SpMM 6", "SpMM 12"} <= set(library.log)
    gc.collect()
    assert not library.alive


@pytest.mark.parametrize(
    ("dtype", "native", "converted"),
    [
        (torch.float32, "ok", "unsupported"),
        (torch.float16, "ok", "ok"),
        (torch.bfloat16, "unsupported", "ok"),
    ],
    ids=str,
)
def test_sddmm_in_every_dtype_gives_cusparses_reason(library, dtype, native, converted):
    rows = rows_of(small_case("sddmm", dtype=dtype))
    for charge in (OP, FROM_TOKEN_MAJOR):
        row, fp32 = rows["cusparse", charge], rows["cusparse-fp32", charge]
        assert (row["status"], fp32["status"]) == (native, converted), row["reason"]
        if native == "unsupported":
            want = "cusparseSDDMM_bufferSize returned 10: the operation is not supported"
            assert row["reason"] == want
    gc.collect()
    assert not library.alive


def test_a_failed_call_is_an_error_not_unsupported(library):
    library.cusparseSpMM_preprocess = lambda *arguments: EXECUTION_FAILED
    rows = rows_of(small_case("spmm"))
    assert {(row["status"], row["reason"]) for row in rows.values()} == {
        ("error", "CusparseError: cusparseSpMM_preprocess returned 6: it failed")
    }


def test_operands_live_as_long_as_the_call(library):
    problem = Problem.of(small_case("spmm"))
    (contender,) = (c for c in cusparse.CONTENDERS if (c.op, c.name) == ("spmm", "cusparse"))
    call = contender.prepare(problem, FROM_TOKEN_MAJOR)
    want = problem.pattern.to_torch(problem.inputs["values"]).to_dense() @ problem.inputs["b"]
    del problem
    gc.collect()
    torch.testing.assert_close(call(), want)
    assert len(library.alive) == 3
    del call
    gc.collect()
    assert not library.alive


def test_without_the_library_every_pair_has_the_reason(monkeypatch):
    monkeypatch.setattr(api, "library", lambda: "cuSPARSE was not found: no such file")
    for op in ("spmm", "sddmm"):
        rows = rows_of(small_case(op, dtype=torch.bfloat16))
        assert {(row["status"], row["reason"]) for row in rows.values()} == {
            ("unsupported", "cuSPARSE was not found: no such file")
        }


def test_a_library_that_fails_to_load_is_reported(monkeypatch):
    monkeypatch.setattr(api, "_loaded", lambda: [])
    monkeypatch.setattr(api, "_NAMES", ("libcusparse-is-not-here.so",))
    reason = api.library.__wrapped__()
    assert reason.startswith("cuSPARSE was not found: libcusparse-is-not-here.so")
