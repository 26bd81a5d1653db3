"""The cost model: more work takes longer, and estimates agree with those made by hand."""

from __future__ import annotations

import pytest
import torch

from rosa_kernels import CsrPattern
from rosa_kernels.backends import cost
from rosa_kernels.backends.machine import MACHINES
from rosa_kernels.kernel import Call, Estimate
from rosa_kernels.testing import uniform_pattern
from rosa_kernels.tile_plan import PlanSizes

H200 = MACHINES["H200"]
SDDMM = (cost.sddmm_gather, cost.sddmm_tile, cost.sddmm_wgmma, cost.dense_sddmm)
SPMM = (cost.spmm_gather, cost.spmm_tile, cost.dense_spmm)
EVERY = [*SDDMM, *SPMM]
NAMES = ["sddmm_gather", "sddmm_tile", "sddmm_wgmma", "dense_sddmm"]
NAMES += ["spmm_gather", "spmm_tile", "dense_spmm"]


def sizes(m: int = 4096, n: int = 4096, nnz: int = 100_000, **changes: int) -> PlanSizes:
    """A plan with 95 % of its nonzeros in 40 tiles."""
    base = PlanSizes(
        m, n, nnz, 128, 256, m * 9 // 10, n // 2, m // 16, n // 20, 40, nnz * 95 // 100
    )
    return base._replace(**changes)


def call_of(model: object, plan: PlanSizes | None = None, k: int = 8192, **changes: object) -> Call:
    plan = plan or sizes()
    shape = (plan.rows, k, plan.cols) if model in SDDMM else (plan.rows, plan.cols, k)
    operands = 2 if model in SDDMM else 1
    call = Call(
        "cuda", torch.bfloat16, shape, "H200", plan.nnz, plan, torch.bfloat16, (False,) * operands
    )
    return call._replace(**changes)


def seconds(model: cost.Model, *args: object, **changes: object) -> float:
    estimate = model(call_of(model, *args, **changes))
    assert isinstance(estimate, Estimate)
    assert all(stage >= 0 for stage in estimate.stages.values())
    assert 0 < estimate.seconds < estimate.at_worst < 10
    return estimate.seconds


@pytest.mark.parametrize("model", EVERY, ids=NAMES)
def test_more_work_takes_longer(model: cost.Model) -> None:
    base = seconds(model)
    assert seconds(model, k=16384) > base
    assert seconds(model, sizes(8192)) >= base
    assert seconds(model, dtype=torch.float32) > base
    assert seconds(model, device="A100") > base
    more = sizes(nnz=200_000)
    assert seconds(model, more) >= base


@pytest.mark.parametrize("model", EVERY, ids=NAMES)
def test_no_estimate_without_enough_information(model: cost.Model) -> None:
    """No model estimates calls on a CPU, or calls without a device, an nnz or the plan it needs."""
    assert model(call_of(model, device_type="cpu")) is None
    assert model(call_of(model, device=None)) is None
    assert model(call_of(model, nnz=None)) is None
    tiles = model in (cost.sddmm_tile, cost.sddmm_wgmma, cost.spmm_tile)
    assert (model(call_of(model)._replace(plan=None)) is None) == tiles


@pytest.mark.parametrize("model", EVERY, ids=NAMES)
def test_empty_calls_take_almost_no_time(model: cost.Model) -> None:
    for pattern, k in ((uniform_pattern(0, 0, 0.0), 0), (uniform_pattern(5, 7, 0.0), 0)):
        estimate = model(call_of(model, pattern.tile_plan.sizes, k))
        assert 0 <= estimate.seconds < 1e-3


def test_gather_time_agrees_with_a_hand_estimate() -> None:
    """4096 x 4096 at 1 %, 8192 tokens: reading 16 KiB per nonzero at 5.5 TB/s takes 0.5 ms."""
    plan = sizes(nnz=167_772, active_rows=4096, active_cols=4096)
    stages = cost.sddmm_gather(call_of(cost.sddmm_gather, plan)).stages
    lines = 167_772 + 167_772 / 32 + 4096
    assert stages["gather"] == pytest.approx(lines * 16384 / 5.5e12)
    assert stages["gather"] == pytest.approx(0.5e-3, rel=0.1)
    read_in_place = call_of(cost.sddmm_gather, plan, in_place=(True, True))
    assert cost.sddmm_gather(read_in_place).stages["pack"] == 0


def test_tile_time_agrees_with_a_hand_estimate() -> None:
    """40 tiles of 128 x 256 need 21.5 GFLOP, and 252 MB from the L2 cache, which takes 46 us."""
    stages = cost.sddmm_tile(call_of(cost.sddmm_tile)).stages
    assert stages["tiles"] == pytest.approx(40 * 384 * 8192 * 2 / 5.5e12, rel=0.08)
    # The L2 cache limits both kernels, so wgmma is not faster.
    assert cost.sddmm_wgmma(call_of(cost.sddmm_wgmma)).stages["tiles"] == stages["tiles"]


def test_dense_time_agrees_with_a_hand_estimate() -> None:
    """A GEMM of 275 GFLOP at 780 TFLOP/s takes 352 us. Slabs and whole waves add 12 % at most."""
    estimate = cost.dense_sddmm(call_of(cost.dense_sddmm))
    assert 352e-6 < estimate.seconds < 1.12 * 352e-6


def test_pack_time_grows_with_active_sectors() -> None:
    few = sizes(active_cols=100, col_sectors=90)
    many = sizes(active_cols=100, col_sectors=7)
    pack = [cost.sddmm_tile(call_of(cost.sddmm_tile, p)).stages["pack"] for p in (few, many)]
    assert pack[0] > pack[1]


@pytest.mark.parametrize("k", [2048, 8192, 16384])
@pytest.mark.parametrize("density", [0.0005, 0.001])
def test_sparse_uniform_masks_use_the_gather_kernel(density: float, k: int) -> None:
    assert fastest(uniform_pattern(4096, 4096, density), k) == "gather"


@pytest.mark.parametrize("k", [2048, 8192, 16384])
@pytest.mark.parametrize("density", [0.02, 0.1])
def test_dense_uniform_masks_use_the_dense_kernel(density: float, k: int) -> None:
    assert fastest(uniform_pattern(4096, 4096, density), k) == "dense"


@pytest.mark.parametrize("k", [2048, 8192, 16384])
def test_skewed_masks_use_the_tile_kernel(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(4096, 1, generator=generator), torch.randn(1, 4096, generator=generator)
    score = 0.5 * u + 0.4 * v + 0.35 * torch.randn(4096, 4096, generator=generator)
    pattern = CsrPattern.from_mask(score > score.flatten().kthvalue(int(0.994 * 2**24)).values)
    assert fastest(pattern, k) == "tile"


def fastest(pattern: CsrPattern, k: int) -> str:
    plan = pattern.make_tile_plan(128, 256, 0.011).sizes
    models = {"gather": cost.sddmm_gather, "tile": cost.sddmm_tile, "dense": cost.dense_sddmm}
    at_worst = {n: model(call_of(model, plan, k)).at_worst for n, model in models.items()}
    return min(at_worst, key=at_worst.get)
