"""rk.explain: the kernel that a call would get, on this machine and on others."""

from __future__ import annotations

import pytest
import torch
from conftest import inputs_of

import rosa_kernels as rk
from rosa_kernels import CsrPattern, choice, registry
from rosa_kernels.kernel import Call, Estimate
from rosa_kernels.testing import uniform_pattern

pytestmark = pytest.mark.usefixtures("sandbox")


def test_explain_on_cpu_lists_every_candidate(pattern: CsrPattern) -> None:
    for op in ("sddmm", "spmm", "csr_add", "csr_add_", "csr_gather", "csr_scatter_"):
        found = rk.explain(op, pattern, k=8)
        assert found.chosen.backend == "cpu"
        assert found.where == "cpu"
        assert all(c.estimate is None for c in found.candidates)
        text = str(found)
        assert "by priority" in text
        for candidate in found.candidates:
            assert candidate.kernel.name in text
            assert candidate.reason is None or candidate.reason in text


def test_explain_of_an_explicit_backend(pattern: CsrPattern) -> None:
    found = rk.explain("sddmm", pattern, k=8, backend="reference")
    assert [c.kernel.name for c in found.candidates] == ["reference"]
    with rk.use_backend("reference"):
        assert rk.explain("sddmm", pattern, k=8).chosen.name == "reference"
    nothing = rk.explain("sddmm", pattern, k=8, backend="cuda")
    assert nothing.chosen is None
    assert "no kernel can serve this call on backend" in str(nothing)
    assert "runs on cuda tensors, got cpu" in str(nothing)


@pytest.mark.parametrize("machine", ["H200", "H100", "A100"])
def test_explain_for_a_gpu_that_is_absent(machine: str) -> None:
    """Its kernels count as available. Each one that can serve has a predicted time per stage."""
    pattern = uniform_pattern(1024, 1024, 0.002)
    found = rk.explain("sddmm", pattern, k=8192, dtype=torch.bfloat16, device=machine)
    reasons = {c.kernel.name: c.reason for c in found.candidates}
    assert reasons["cuda/gather"] is None
    assert reasons["cuda/tile"] is None
    assert reasons["dense"] is None
    hopper = machine != "A100"
    assert (reasons["cuda/wgmma"] is None) == hopper
    if not hopper:
        assert reasons["cuda/wgmma"] == "runs only on compute capability 9.0, got 8.0"
    assert found.call.plan.tile_cols == (256 if hopper else 128)
    assert (
        found.chosen
        is min(
            (c for c in found.candidates if c.estimate), key=lambda c: c.estimate.at_worst
        ).kernel
    )
    text = str(found)
    assert f"on {machine} (rates partly estimated)" in text
    assert "nnz 2097, bfloat16" in text
    assert "heavy tiles of 128 x" in text
    for words in ("predicted", "at worst", "pack", "gather", "gemm", "runs on cpu tensors"):
        assert words in text
    assert not pattern.has_tile_plan  # a plan with another machine's tiles is not kept


def test_explain_float32_for_an_absent_gpu() -> None:
    pattern = uniform_pattern(512, 512, 0.001)
    found = rk.explain("sddmm", pattern, k=2048, device="H200")
    reasons = {c.kernel.name: c.reason for c in found.candidates}
    assert reasons["cuda/wgmma"] == "takes dtypes bfloat16, float16, got float32"
    assert found.chosen.name == "cuda/gather"


def test_finite_only_kernels_need_the_callers_promise() -> None:
    pattern = uniform_pattern(2048, 2048, 0.2)
    options = {"k": 4096, "dtype": torch.bfloat16, "device": "H200"}
    careful = rk.explain("spmm", pattern, **options)
    assert careful.chosen.name == "cuda/gather"
    assert "needs operands without Inf and NaN" in str(careful)
    assert rk.explain("spmm", pattern, **options, backend="auto-finite").chosen.finite_only
    by_name = rk.explain("spmm", pattern, **options, backend="dense")
    assert by_name.chosen.name == "dense"


def test_row_major_operands_need_no_pack() -> None:
    """Row-major operands are read in place. Token-major ones are packed first."""
    pattern = uniform_pattern(1024, 1024, 0.002)
    pack = {}
    for layout in ("token-major", "row-major"):
        found = rk.explain("sddmm", pattern, k=4096, device="H200", layout=layout)
        (gather,) = [c for c in found.candidates if c.kernel.name == "cuda/gather"]
        pack[layout] = gather.estimate.stages["pack"]
    assert pack["row-major"] == 0 < pack["token-major"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": None}, ValueError, "expected a number of tokens k for sddmm, got None"),
        ({"k": -1}, ValueError, "expected a number of tokens k for sddmm, got -1"),
        ({"layout": "diagonal"}, ValueError, "expected a layout among .*, got 'diagonal'"),
        (
            {"device": "H300"},
            ValueError,
            "expected a device or one of H200, H100, A100, got 'H300'",
        ),
        ({"backend": "cpus"}, ValueError, "expected a backend among .*, got 'cpus'"),
        ({"op": "conv"}, ValueError, "expected an op among .*, got 'conv'"),
    ],
)
def test_bad_arguments_of_explain_are_refused(
    options: dict[str, object], error: type[Exception], message: str, pattern: CsrPattern
) -> None:
    with pytest.raises(error, match=message):
        rk.explain(**{"op": "sddmm", "pattern": pattern, "k": 8, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_explain_refuses_a_missing_cuda_device(pattern: CsrPattern) -> None:
    with pytest.raises(
        RuntimeError, match="expected a CUDA device here, got none; name one of H200"
    ):
        rk.explain("sddmm", pattern, k=8, device="cuda")


# -- how predicted times decide the choice -------------------------------------------------------


def timed(op: str, name: str, seconds: float, uncertainty: float = 0.0, **options: object) -> None:
    """Register a kernel of `op` that is predicted to take `seconds`."""

    def run(*_: object) -> torch.Tensor:
        return torch.full((1,), seconds)

    settings: dict[str, object] = {"devices": {"cpu"}, "dtypes": {torch.float32}, "priority": 1000}
    settings["cost"] = lambda call: Estimate({"all": seconds}, uncertainty)
    rk.register(op, name, **{**settings, **options})(run)


def chosen(op: str = "csr_gather", backend: str = "auto") -> str:
    return choice.select(op, Call("cpu", torch.float32, (3, 4)), backend).name


def test_shortest_predicted_time_wins_over_priority() -> None:
    timed("csr_gather", "slow", 2.0, priority=3000)
    timed("csr_gather", "fast", 1.0, priority=2000)
    assert chosen() == "fast"


def test_the_best_worst_case_time_wins() -> None:
    """A faster but less certain prediction loses if its worst case is slower."""
    timed("csr_gather", "promising", 0.95, uncertainty=0.25)
    timed("csr_gather", "sure", 1.0, uncertainty=0.03)
    assert chosen() == "sure"
    timed("csr_gather", "much-better", 0.7, uncertainty=0.25)
    assert chosen() == "much-better"


def test_without_a_prediction_priority_decides() -> None:
    timed("csr_gather", "timed", 1e-9, priority=-1)
    assert chosen() == "cpu"
    timed("csr_gather", "untimed", 0.0, priority=5000, cost=None)
    assert chosen() == "untimed"
    timed("csr_gather", "unknown", 0.0, priority=6000, cost=lambda call: None)
    assert chosen() == "unknown"


def test_kernels_that_cannot_serve_are_not_chosen() -> None:
    timed("csr_gather", "picky", 1e-9, reject=lambda call: "no")
    timed("csr_gather", "broken", 1e-9, unavailable="is broken")
    timed("csr_gather", "shy", 1e-9, on_request=True)
    timed("csr_gather", "leaky", 1e-9, finite_only=True)
    timed("csr_gather", "plain", 1.0)
    assert chosen() == "plain"
    assert chosen(backend="shy") == "shy"
    assert chosen(backend="auto-finite") == "leaky"
    assert chosen(backend="leaky") == "leaky"


def test_repeated_calls_reuse_their_choice(pattern: CsrPattern) -> None:
    """A repeated call does not evaluate the cost model again. A call with another shape does."""
    asked: list[Call] = []

    def cost(call: Call) -> Estimate:
        asked.append(call)
        return Estimate({"all": 1.0}, 0.0)

    timed("sddmm", "counted", 1.0, cost=cost)
    kernel = rk.kernels("sddmm")[0]
    assert kernel.name == "counted"
    inputs = inputs_of("sddmm", pattern)
    for _ in range(3):
        rk.sddmm(pattern, **inputs)
    assert len(asked) == 1
    rk.sddmm(pattern, inputs["a"][:, :7], inputs["b"][:, :7])
    assert len(asked) == 2
    (first, second) = asked
    assert first.shape == (37, 33, 53)
    assert second.shape == (37, 7, 53)
    assert first.nnz == pattern.nnz
    assert first.values_dtype == torch.float32
    assert first.in_place == (False, False)
    assert first.exact


def test_the_cache_of_choices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_MOST_CHOSEN", 10)
    timed("csr_gather", "timed", 1.0)
    for n in range(100):
        choice.select("csr_gather", Call("cpu", torch.float32, (3, n)))
    assert len(registry.chosen) <= 10


def test_explain_respects_torchs_precision_settings(pattern: CsrPattern) -> None:
    """As in a call, "dense" multiplies float32 in full precision or not at all."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        found = rk.explain("sddmm", pattern, k=8, backend="dense")
        assert found.chosen is None
        assert "full precision only" in str(found)
    finally:
        matmul.fp32_precision = before
    assert rk.explain("sddmm", pattern, k=8, backend="dense").chosen.name == "dense"
