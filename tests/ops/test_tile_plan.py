"""TilePlan: its two builders, when it is built and kept, movement, and what kernels get."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import inputs_of, sweep
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern, registry, tile_plan
from rosa_kernels.backends import native, reference, reference_plan
from rosa_kernels.testing import NASTY, assert_accurate, uniform_pattern
from rosa_kernels.tile_plan import HEADER, HEAVY_FILL, SLABS, PlanSizes

TILES = [(128, 128), (128, 256), (16, 32)]
needs_native = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


def build(how: object, pattern: CsrPattern, *options: object) -> tuple[Tensor, Tensor]:
    return how.tile_plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], *options)


def skewed() -> CsrPattern:
    """A pattern with heavy tiles, light entries and cut rows."""
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(300, 1, generator=generator) ** 4 * torch.rand(1, 2000, generator=generator)
    return CsrPattern.from_mask(torch.rand(300, 2000, generator=generator) < share)


# -- what is built -------------------------------------------------------------------------------


@needs_native
@sweep(nasty=NASTY, tile=TILES, fill=[HEAVY_FILL, 0.0, 0.2, 2.0])
def test_native_and_reference_plans_are_equal(
    nasty: CsrPattern, tile: tuple[int, int], fill: float
) -> None:
    for pattern in (nasty, skewed()):
        header, blob = build(native, pattern, *tile, fill)
        expected_header, expected_blob = build(reference_plan, pattern, *tile, fill)
        assert torch.equal(header, expected_header)
        assert torch.equal(blob, expected_blob)
        assert (header.dtype, blob.dtype) == (torch.int64, torch.int32)


def test_python_and_cpp_headers_have_equal_fields() -> None:
    """The fields have equal names in equal order."""
    source = Path(__file__).parents[2] / "cpp/include/rosa/tile_plan.h"
    if not source.is_file():
        pytest.skip("needs the C++ sources")
    text = source.read_text()
    enum = re.search(r"enum PlanField : int {(.*?)kPlanFields,", text, re.S).group(1)
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", n).lower() for n in re.findall(r"kPlan(\w+),", enum)]
    assert tuple(names) == PlanSizes._fields
    assert f"kHeavyFill = {HEAVY_FILL};" in text
    assert f"kSlabs = {SLABS};" in text
    assert len(PlanSizes._fields) + SLABS + 1 == HEADER


@sweep(nasty=NASTY)
def test_slab_offsets_agree_with_crow_indices(nasty: CsrPattern) -> None:
    m = nasty.shape[0]
    offsets = tile_plan.slab_offsets(nasty.tile_plan.header)
    assert offsets == [int(nasty.crow_indices[m * s // SLABS]) for s in range(SLABS + 1)]


def test_stats_agree_with_brute_force() -> None:
    pattern = skewed()
    mask = pattern.to_torch(torch.ones(pattern.nnz)).to_dense()
    mask = mask[torch.argsort(mask.sum(1), descending=True, stable=True)]
    mask = mask[:, torch.argsort(mask.sum(0), descending=True, stable=True)]
    padded = torch.zeros(384, 2048)
    padded[:300, :2000] = mask
    count = padded.view(3, 128, 16, 128).sum((1, 3))
    heavy = count >= HEAVY_FILL * 128 * 128
    plan = pattern.tile_plan
    rows = pattern.row_nnz
    assert plan.stats() == {
        "tile_rows": 128,
        "tile_cols": 128,
        "tiles": int(heavy.sum()),
        "heavy_nnz": pytest.approx(float(count[heavy].sum()) / pattern.nnz),
        "area": pytest.approx(int(heavy.sum()) * 128 * 128 / (300 * 2000)),
        "light_nnz": int(count[~heavy].sum()),
        "active_rows": int((rows > 0).sum()),
        "active_cols": int((pattern.col_nnz > 0).sum()),
        "bytes": 8 * HEADER + 4 * plan.blob.numel(),
        "seconds": plan.seconds,
    }
    assert 0 < plan.stats()["tiles"] < 48
    assert plan.stats()["light_nnz"] > 0
    assert plan.seconds > 0


def test_plans_print_a_summary() -> None:
    plan = uniform_pattern(40, 30, 0.5).tile_plan
    assert str(plan) == plan.summary()
    lines = str(plan).splitlines()
    assert lines[0] == "TilePlan of 40 x 30, nnz 600, on cpu"
    assert "1 tiles of 128 x 128 with 100.0% of nnz in 1365.3% of the area" in lines[2]
    assert repr(plan) == "TilePlan(40 x 30, 1 heavy tiles of 128 x 128, device='cpu')"


# -- when plans are built and kept -----------------------------------------------------------------


def test_a_plan_is_built_once(pattern: CsrPattern) -> None:
    assert not pattern.has_tile_plan
    plan = pattern.tile_plan
    assert pattern.has_tile_plan
    assert pattern.tile_plan is plan
    assert plan.tensors[0] is plan.header
    assert plan.tensors[1] is plan.blob
    assert plan.tile == (128, 128)
    assert not pattern.T.has_tile_plan


@sweep(nasty=NASTY)
def test_the_transpose_has_its_own_plan(nasty: CsrPattern) -> None:
    fresh = CsrPattern(nasty.T.crow_indices, nasty.T.col_indices, nasty.T.shape)
    assert torch.equal(nasty.T.tile_plan.blob, fresh.tile_plan.blob)
    assert torch.equal(nasty.T.tile_plan.header, fresh.tile_plan.header)


def test_plans_can_have_other_tiles(pattern: CsrPattern) -> None:
    plan = pattern.build_tile_plan(32, 64, 0.05)
    assert pattern.tile_plan is plan
    assert plan.tile == (32, 64)
    assert pattern.make_tile_plan(16, 16, 0.05).tile == (16, 16)
    assert pattern.tile_plan is plan
    assert pattern.build_tile_plan().tile == (128, 128)


@pytest.mark.parametrize("builder", [native, reference_plan], ids=["native", "reference"])
@pytest.mark.parametrize("bad", [(0, 128, 0.1), (128, 24, 0.1), (-16, 16, 0.1), (512, 256, 0.1)])
def test_invalid_tiles_are_refused(
    builder: object, bad: tuple[int, int, float], pattern: CsrPattern
) -> None:
    if builder is native and native.MISSING is not None:
        pytest.skip(native.MISSING)
    with pytest.raises(ValueError, match="tile_plan: expected tile edges that are multiples of 16"):
        build(builder, pattern, *bad)
    for fill in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="tile_plan: expected a heavy fill of 0 or more"):
            build(builder, pattern, 128, 128, fill)
    with pytest.raises(ValueError, match="tile_plan: expected tile edges"):
        pattern.build_tile_plan(*bad)
    assert not pattern.has_tile_plan


def test_a_changed_pattern_gets_no_plan(pattern: CsrPattern) -> None:
    """Changed indices may point anywhere."""
    pattern.col_indices.fill_(10**6)
    with pytest.raises(RuntimeError, match="changed in place"):
        pattern.tile_plan  # noqa: B018
    assert not pattern.has_tile_plan


def test_plans_are_built_without_the_native_library(
    pattern: CsrPattern, sandbox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        registry._kernels, "tile_plan", [k for k in rk.kernels("tile_plan") if k.name != "cpu"]
    )
    assert pattern.tile_plan.sizes.nnz == pattern.nnz


def test_copies_have_no_plan(pattern: CsrPattern) -> None:
    assert pattern.tile_plan
    for other in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert not other.has_tile_plan
        assert torch.equal(other.tile_plan.blob, pattern.tile_plan.blob)


def test_plans_are_never_inference_tensors(pattern: CsrPattern) -> None:
    with torch.inference_mode():
        tensors = pattern.tile_plan.tensors + pattern.T.tile_plan.tensors
    assert not any(x.is_inference() for x in tensors)


# -- movement ------------------------------------------------------------------------------------


def test_plans_move_with_their_pattern(pattern: CsrPattern) -> None:
    """The blob moves, the header stays on the host, and the transpose keeps what it derived."""
    plans = pattern.tile_plan, pattern.T.tile_plan
    assert pattern.T.row_nnz.numel() == 53
    pattern.T.stats()
    moved = pattern.to("meta")
    for here, there in zip(plans, (moved.tile_plan, moved.T.tile_plan), strict=True):
        assert there.blob.device.type == "meta"
        assert there.header is here.header
        assert there.stats() == {**here.stats(), "seconds": 0.0}
    assert moved.T.T is moved
    assert moved.T.row_nnz.device.type == "meta"
    assert moved.T.stats() == pattern.T.stats()
    assert plans[0].to("cpu") is plans[0]
    assert not uniform_pattern(3, 3, 0.5).to("meta").has_tile_plan


@pytest.mark.parametrize(("asked_for", "stays"), [(None, False), ((32, 32), True)])
def test_only_plans_with_chosen_tiles_move(
    pattern: CsrPattern,
    asked_for: tuple[int, int] | None,
    stays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plan with default tiles is dropped, because the other device has other default tiles."""

    def default(device: torch.device) -> tuple[int, int]:
        return (128, 128) if device.type == "cpu" else (128, 256)

    monkeypatch.setattr("rosa_kernels.pattern.default_tile", default)
    pattern.build_tile_plan(*(asked_for or ()))
    assert pattern.to("meta").has_tile_plan == stays


def test_default_tiles_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_plan.default_tile(torch.device("cpu")) == (128, 128)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        wide = 256 if capability == (9, 0) else 128
        assert tile_plan.default_tile(torch.device("cuda", 1)) == (128, wide)


# -- the plans that kernels get --------------------------------------------------------------------


@pytest.fixture
def seen(sandbox: None) -> list[tuple[str, list[Tensor]]]:
    """The log of the backend "planner": reference kernels that log the plans they get."""
    log: list[tuple[str, list[Tensor]]] = []

    def planner(op: str, run: object) -> object:
        def logged(*arguments: object) -> object:
            *rest, plan = arguments
            log.append((op, list(plan)))
            return run(*rest)

        return logged

    for op, run in (("sddmm", reference.sddmm), ("spmm", reference.spmm)):
        for kernel in rk.kernels(op):
            if kernel.name == "reference":
                rk.register(
                    op,
                    "planner",
                    devices={"cpu"},
                    dtypes=set(kernel.dtypes),
                    priority=-1,
                    reads_plan={"cpu"},
                    on_request=True,
                )(planner(op, run))
    return log


def which(pattern: CsrPattern, plan: list[Tensor]) -> str:
    for name, p in (("plan", pattern), ("transposed", pattern.T)):
        if plan and p.has_tile_plan and torch.equal(plan[1], p.tile_plan.blob):
            assert torch.equal(plan[0], p.tile_plan.header)
            return name
    assert plan == []
    return "none"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_kernels_get_plans_in_forward_and_backward(
    op: str, compiled: bool, pattern: CsrPattern, seen: list[tuple[str, list[Tensor]]]
) -> None:
    """Each product gets its own pattern's plan, which is built before or during the call."""
    torch._dynamo.reset()
    inputs = {name: x.requires_grad_() for name, x in inputs_of(op, pattern).items()}
    if compiled:
        assert pattern.tile_plan
        assert pattern.T.tile_plan

    def call(**operands: Tensor) -> Tensor:
        return getattr(rk, op)(pattern=pattern, backend="planner", **operands)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    out = run(**inputs)
    assert_accurate(op, pattern, inputs, out)
    out.sum().backward()
    products = {"sddmm": ["spmm", "spmm"], "spmm": ["sddmm", "spmm"]}[op]
    assert [(name, which(pattern, plan)) for name, plan in seen] == [
        (op, "plan"),
        (products[0], "plan"),
        (products[1], "transposed"),
    ]


def test_only_plans_that_kernels_read_are_built(
    pattern: CsrPattern, seen: list[tuple[str, list[Tensor]]]
) -> None:
    inputs = inputs_of("sddmm", pattern)
    rk.sddmm(pattern, **inputs)
    rk.sddmm(pattern, **inputs, backend="reference")
    assert not pattern.has_tile_plan  # no CPU kernel reads a plan
    inputs["a"].requires_grad_()
    rk.sddmm(pattern, **inputs, backend="planner").sum().backward()
    assert pattern.has_tile_plan
    assert not pattern.has_transpose


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls_build_no_plan(
    grad: bool, pattern: CsrPattern, seen: list[tuple[str, list[Tensor]]]
) -> None:
    """A graph cannot build a plan. A plan that is built later is used from then on."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(a: Tensor, b: Tensor) -> Tensor:
        return rk.sddmm(pattern, a, b, backend="planner")

    inputs = {n: x.requires_grad_(grad) for n, x in inputs_of("sddmm", pattern).items()}
    assert_accurate("sddmm", pattern, inputs, call(**inputs))
    assert not pattern.has_tile_plan
    assert [plan for _, plan in seen] == [[]]
    assert pattern.tile_plan
    call(**inputs)
    assert which(pattern, seen[-1][1]) == "plan"


def test_kernels_get_plans_in_double_backward(
    pattern: CsrPattern, seen: list[tuple[str, list[Tensor]]]
) -> None:
    """Products of the second order have a plan if they have its pattern, and otherwise none."""
    inputs = {n: x.requires_grad_() for n, x in inputs_of("sddmm", pattern, 3).items()}
    grads = torch.autograd.grad(
        rk.sddmm(pattern, **inputs, backend="planner").square().sum(),
        tuple(inputs.values()),
        create_graph=True,
    )
    torch.autograd.grad(sum(g.square().sum() for g in grads), tuple(inputs.values()))
    assert {which(pattern, plan) for _, plan in seen} == {"plan", "transposed", "none"}
