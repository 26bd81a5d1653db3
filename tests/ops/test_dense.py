"""The dense kernels: slabs, and the calls that the kernels reject."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import inputs_of, sweep
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.backends import dense, slabs
from rosa_kernels.kernel import Call
from rosa_kernels.testing import LAYOUTS, assert_accurate, uniform_pattern
from rosa_kernels.tile_plan import SLABS, PlanSizes

KERNELS = {op: next(k for k in rk.kernels(op) if k.name == "dense") for op in ("sddmm", "spmm")}
PLAN = PlanSizes(*[128] * len(PlanSizes._fields))


@pytest.fixture(params=[2**13, 2**14, 2**16])
def small_slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slabs so small that a small problem takes several."""
    slabs.slab_edges.cache_clear()
    monkeypatch.setattr(slabs, "SLAB_BYTES", request.param)
    monkeypatch.setattr(dense, "SLAB_BYTES", request.param)
    yield request.param
    slabs.slab_edges.cache_clear()


@sweep(
    planned=[False, True],
    layout=["row-major", "token-major", "sliced", "stride-0"],
    op=["sddmm", "spmm"],
)
def test_slabs_are_accurate_and_within_their_limit(
    op: str,
    layout: str,
    planned: bool,
    small_slabs: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results are accurate, and no GEMM writes more than one slab."""
    pattern = uniform_pattern(333, 70, 0.05, seed=2)
    inputs = {name: LAYOUTS[layout](x) for name, x in inputs_of(op, pattern, 50, dtype).items()}
    written: list[int] = []
    mm = torch.mm

    def recorded(*args: Tensor, **options: object) -> Tensor:
        out = mm(*args, **options)
        written.append(out.nbytes)
        return out

    plan = pattern.tile_plan.tensors if planned else []
    index = (pattern.crow_indices, pattern.col_indices)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", recorded)
        if op == "sddmm":
            got = dense.sddmm(*index, inputs["a"], inputs["b"], dtype, plan)
        else:
            got = dense.spmm(*index, inputs["values"], inputs["b"], plan)
    assert_accurate(op, pattern, inputs, got)
    assert len(written) > 1
    assert max(written) <= small_slabs


def test_empty_slabs_need_no_gemm(small_slabs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(320, 64)
    mask[300, 5] = 1
    pattern = CsrPattern.from_mask(mask)
    calls = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or mm(*a, **k))
    b = torch.ones(64, 3)
    assert rk.sddmm(pattern, torch.ones(320, 3), b, backend="dense").tolist() == [3.0]
    out = rk.spmm(pattern, torch.tensor([2.0]), b, backend="dense")
    assert out.sum() == 6
    assert len(calls) == 2


@sweep(
    rows=[0, 1, 5, 31, 32, 33, 4096, 11008, 128256],
    row_bytes=[0, 4, 4096 * 4, 11008 * 4, 65536 * 4],
)
def test_slabs_cover_all_rows_and_are_few(rows: int, row_bytes: int) -> None:
    """The slabs cover all rows and are as few as their greatest size allows."""
    edges = slabs.slab_edges(rows, row_bytes)
    if edges is None:
        assert -(-rows // SLABS) * row_bytes > slabs.MOST_SLAB_BYTES
        return
    assert edges[0] == 0
    assert edges[-1] == SLABS
    assert sorted(set(edges)) == list(edges)

    def tallest(edges: list[int]) -> int:
        at = [rows * s // SLABS for s in edges]
        return max(b - a for a, b in pairwise(at)) * row_bytes

    count = len(edges) - 1
    assert tallest(edges) <= (slabs.SLAB_BYTES if count < SLABS else slabs.MOST_SLAB_BYTES)
    for fewer in range(1, count):
        assert tallest([SLABS * i // fewer for i in range(fewer + 1)]) > slabs.SLAB_BYTES


def test_matrices_of_models_take_several_slabs() -> None:
    assert len(slabs.slab_edges(4096, 4096 * 4)) == 3
    assert len(slabs.slab_edges(11008, 4096 * 4)) > 5


def call_of(op: str, **changes: object) -> Call:
    call = Call("cuda", torch.bfloat16, (64, 64, 64), 0, 9, PLAN, torch.bfloat16, (True, True))
    return call._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"plan": None}, "needs the pattern's tile plan, to know on the host where slabs"),
        ({"plan": None, "device_type": "cpu"}, None),
        ({"exact": False, "dtype": torch.float32}, "multiplies float32 in full precision only"),
        ({"shape": (2**20, 2**15, 2**20)}, "works in at most 32 slabs of 67108864 bytes, got"),
    ],
)
@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_calls_are_rejected_with_the_right_reason(
    op: str, changes: dict[str, object], reason: str | None
) -> None:
    got = KERNELS[op].reason(call_of(op, **{"values_dtype": changes.get("dtype"), **changes}))
    assert got == reason if reason is None else got.startswith(reason)


def test_float32_values_are_rejected_on_cuda() -> None:
    """On CUDA, the GEMM would have to round float32 values to the dtype of a 16-bit b."""
    wide = call_of("spmm", values_dtype=torch.float32)
    assert "takes values of b's dtype" in KERNELS["spmm"].reason(wide)
    assert KERNELS["spmm"].reason(wide._replace(device_type="cpu")) is None
    assert KERNELS["sddmm"].reason(wide) is None


def test_the_reduced_precision_setting_is_rejected(pattern: CsrPattern) -> None:
    """The setting lets torch round float32 operands to bfloat16 before a product."""
    inputs = inputs_of("sddmm", pattern)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with pytest.raises(RuntimeError, match="dense multiplies float32 in full precision only"):
            rk.sddmm(pattern, **inputs, backend="dense")
        rk.sddmm(pattern, **inputs)
    finally:
        matmul.fp32_precision = before
    assert_accurate("sddmm", pattern, inputs, rk.sddmm(pattern, **inputs, backend="dense"))


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_autocast_rounds_dense_operands_once(op: str, pattern: CsrPattern) -> None:
    inputs = inputs_of(op, pattern)
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(rk, op)(pattern=pattern, **inputs, backend="dense")
    rounded = {n: x if n == "values" else x.bfloat16() for n, x in inputs.items()}
    assert got.dtype == torch.bfloat16
    assert_accurate(op, pattern, rounded, got)


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_dense_is_never_chosen_on_cpu(op: str) -> None:
    pattern = uniform_pattern(32, 32, 1.0)
    for backend in ("auto", "auto-finite"):
        assert rk.explain(op, pattern, k=8, backend=backend).chosen.backend == "cpu"
