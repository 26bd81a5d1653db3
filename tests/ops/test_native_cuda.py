"""The Python adapter of the CUDA kernels, with a recorder in place of the native module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import inputs_of

import rosa_kernels as rk
from rosa_kernels import CsrPattern, registry
from rosa_kernels.backends import native, native_cuda
from rosa_kernels.kernel import Call
from rosa_kernels.testing import uniform_pattern
from rosa_kernels.tile_plan import HEADER

pytestmark = pytest.mark.usefixtures("sandbox")
BYTES = 1000


class Recorder:
    """Has the cuda_* functions of the native module. They record calls and compute nothing."""

    def __init__(self, **answers: object) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers = {
            "cuda_unavailable": "",
            "cuda_unsupported": "",
            "cuda_has_wgmma": True,
            "cuda_properties": (132, 9, 0, 50 << 20, 227 << 10),
            "cuda_sddmm_shared_bytes": 227 << 10,
            "cuda_spmm_shared_bytes": 96 << 10,
            "cuda_sddmm_workspace_bytes": BYTES,
            "cuda_spmm_workspace_bytes": BYTES,
            **answers,
        }

    def __getattr__(self, name: str) -> Callable[..., object]:
        if not name.startswith("cuda_"):
            raise AttributeError(name)

        def record(*arguments: object) -> object:
            self.calls.append((name, arguments))
            answer = self.answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return record

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


def registered(**answers: object) -> Recorder:
    module = Recorder(**answers)
    native_cuda.register_cuda_kernels(module, "fake", "cpu", on_request=True)
    return module


def test_arguments_of_the_native_functions(pattern: CsrPattern) -> None:
    module = registered()
    inputs = inputs_of("sddmm", pattern, dtype=torch.bfloat16)
    out = rk.sddmm(pattern, **inputs, out_dtype=torch.float32, backend="fake/tile")
    assert (out.shape, out.dtype) == ((pattern.nnz,), torch.float32)
    (asked,) = module.named("cuda_sddmm_workspace_bytes")
    (call,) = module.named("cuda_sddmm")
    variant, csr, plan, a, b, to, work, device, stream = call
    index = pattern.crow_indices.data_ptr(), pattern.col_indices.data_ptr()
    assert csr == (*index, 37, 53, pattern.nnz)
    header, blob = pattern.tile_plan.tensors
    assert plan == (header.data_ptr(), HEADER, blob.data_ptr(), blob.numel())
    assert a == (inputs["a"].data_ptr(), 1, 37, 33, 1, 37)
    assert b == (inputs["b"].data_ptr(), 1, 53, 33, 1, 53)
    assert to == (out.data_ptr(), 0, pattern.nnz, 1)
    assert (variant, device, stream) == (1, 0, 0)
    assert work != 0
    assert asked == (variant, csr, plan, a, b, device)

    inputs = inputs_of("spmm", pattern, dtype=torch.bfloat16)
    c = rk.spmm(pattern, **inputs, backend="fake/gather")
    (call,) = module.named("cuda_spmm")
    assert call[:3] == (0, csr, plan)
    assert call[3] == (inputs["values"].data_ptr(), 1, pattern.nnz, 1)
    assert call[5] == (c.data_ptr(), 1, 37, 33, 1, 37)


def test_csr_ops_allocate_no_workspace(pattern: CsrPattern) -> None:
    module = registered()
    w, values = torch.zeros(pattern.shape), torch.ones(pattern.nnz)
    rk.csr_add_(w, pattern, values, 0.5, backend="fake")
    rk.csr_gather(w, pattern, backend="fake")
    rk.csr_scatter_(w, pattern, values, backend="fake")
    called = [name for name, _ in module.calls if name != "cuda_unsupported"]
    assert called == ["cuda_csr_add_", "cuda_csr_gather", "cuda_csr_scatter_"]
    assert module.named("cuda_csr_add_")[0][3:] == (0.5, 0, 0)


def test_auto_never_takes_on_request_kernels(pattern: CsrPattern) -> None:
    module = registered()
    rk.sddmm(pattern, **inputs_of("sddmm", pattern))
    assert not module.calls
    assert not pattern.has_tile_plan


def test_a_backend_takes_its_best_variant(pattern: CsrPattern) -> None:
    """wgmma needs 256-column tiles, tensor cores do not take float32, SpMM's tiles leak Inf."""
    module = registered()
    narrow = inputs_of("sddmm", pattern, dtype=torch.float16)
    rk.sddmm(pattern, **narrow, backend="fake")
    pattern.build_tile_plan(128, 256)
    rk.sddmm(pattern, **narrow, backend="fake")
    rk.sddmm(pattern, **inputs_of("sddmm", pattern), backend="fake")
    assert [call[0] for call in module.named("cuda_sddmm")] == [1, 2, 0]
    rk.spmm(pattern, **inputs_of("spmm", pattern, dtype=torch.float16), backend="fake")
    assert [call[0] for call in module.named("cuda_spmm")] == [0]


@pytest.mark.parametrize(
    ("answers", "changes", "reason"),
    [
        ({}, {}, None),
        ({"cuda_unsupported": "has no code for 7.0: built for 80"}, {}, "has no code for 7.0"),
        (
            {"cuda_properties": (108, 8, 0, 1, 1)},
            {},
            "runs only on compute capability 9.0, got 8.0",
        ),
        ({"cuda_has_wgmma": False}, {}, "was not built for compute capability 9.0"),
        (
            {},
            {"plan": None},
            "needs the pattern's tile plan, which torch.compile and graph capture",
        ),
        ({}, {"plan": (128, 128)}, "needs a plan of 128 x 256 tiles, got 128 x 128"),
        ({}, {"dtype": torch.float32}, "takes dtypes bfloat16, float16, got float32"),
        ({}, {"dtype": torch.float64}, "takes dtypes bfloat16, float16, got float64"),
        ({}, {"device": "A100"}, "runs only on compute capability 9.0, got 8.0"),
        ({"cuda_unsupported": "no code"}, {"device": "H200"}, None),
    ],
)
def test_calls_are_rejected_with_the_right_reason(
    answers: dict[str, object], changes: dict[str, Any], reason: str | None
) -> None:
    registered(**answers)
    (kernel,) = [k for k in rk.kernels("sddmm") if k.name == "fake/wgmma"]
    tile = changes.pop("plan", (128, 256))
    plan = tile and uniform_pattern(9, 9, 0.5).make_tile_plan(*tile, 0.01).sizes
    call = Call("cpu", torch.bfloat16, (9, 9, 9), device=0, nnz=40, plan=plan)
    got = kernel.reason(call._replace(**changes), "fake/wgmma")
    assert (got is None) if reason is None else got.startswith(reason)


@pytest.mark.parametrize(("op", "needed"), [("sddmm", 147456), ("spmm", 98304)])
def test_tiles_beyond_shared_memory_are_rejected(op: str, needed: int, pattern: CsrPattern) -> None:
    """A plan for an H100 may reach an RTX 4090. Without the check, the launch would fail."""
    there = needed - 1024
    module = registered(
        **{f"cuda_{op}_shared_bytes": needed, "cuda_properties": (128, 8, 9, 72 << 20, there)}
    )
    pattern.build_tile_plan(128, 256)
    inputs = inputs_of(op, pattern, dtype=torch.bfloat16)
    reason = (
        rf"fake/tile needs {needed} bytes of shared memory a block for tiles 256 wide, got a "
        rf"device with {there}"
    )
    with pytest.raises(RuntimeError, match=reason):
        getattr(rk, op)(pattern, **inputs, backend="fake/tile")
    getattr(rk, op)(pattern, **inputs, backend="fake")
    assert [call[0] for call in module.named(f"cuda_{op}")] == [0]  # gather
    assert len(module.named(f"cuda_{op}_shared_bytes")) == 1  # queried once for all calls


def test_shared_memory_that_tiles_need() -> None:
    """Tiles have two stages on an A100 and three elsewhere.

    Compute capabilities 8.6 and 8.9 have no room for wide tiles.
    """
    simt = pytest.importorskip("_simt", reason="tests/_simt is not built")
    a100, rtx = 3, 4
    tile, wgmma = 1, 2
    assert [simt.cuda_sddmm_shared_bytes(tile, 128, d) for d in (0, a100, rtx)] == [
        98304,
        69632,
        98304,
    ]
    assert simt.cuda_sddmm_shared_bytes(tile, 256, rtx) == 147456 > simt.cuda_properties(rtx)[4]
    assert simt.cuda_sddmm_shared_bytes(wgmma, 256, 0) <= simt.cuda_properties(0)[4]
    assert simt.cuda_spmm_shared_bytes(tile) == 98304 <= simt.cuda_properties(rtx)[4]
    assert simt.cuda_sddmm_shared_bytes(0, 256, rtx) == simt.cuda_spmm_shared_bytes(0) == 0


def test_device_support_is_queried_once(pattern: CsrPattern) -> None:
    """The query is a driver call. Many calls of an op need only one."""
    module = registered()
    for k in range(1, 50):
        rk.sddmm(pattern, **inputs_of("sddmm", pattern, k), backend="fake/gather")
    assert len(module.named("cuda_unsupported")) == 1


def test_unsupported_devices_are_refused_with_a_reason(pattern: CsrPattern) -> None:
    registered(cuda_unsupported="has no code for compute capability 7.0 in this build, which was")
    with pytest.raises(RuntimeError, match=r"fake/gather has no code for compute capability 7\.0"):
        rk.sddmm(pattern, **inputs_of("sddmm", pattern), backend="fake/gather")


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_no_launch_after_workspace_out_of_memory(op: str, pattern: CsrPattern) -> None:
    """torch raises its own error before any launch. The next call works."""
    module = registered(**{f"cuda_{op}_workspace_bytes": 2**62})
    inputs = inputs_of(op, pattern)
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match=r"alloc|memory"):
        getattr(rk, op)(pattern=pattern, **inputs, backend="fake/gather")
    assert not module.named(f"cuda_{op}")
    module.answers[f"cuda_{op}_workspace_bytes"] = BYTES
    getattr(rk, op)(pattern=pattern, **inputs, backend="fake/gather")
    assert len(module.named(f"cuda_{op}")) == 1


def test_launch_errors_are_runtime_errors(pattern: CsrPattern) -> None:
    registered(cuda_sddmm=RuntimeError("sddmm_gather_kernel: too many resources requested"))
    with pytest.raises(RuntimeError, match="too many resources"):
        rk.sddmm(pattern, **inputs_of("sddmm", pattern), backend="fake/gather")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header, blob: [header.int(), blob],
            "header of a tile plan as 44 contiguous int64 on the CPU",
        ),
        (
            lambda header, blob: [header[:-1], blob],
            "header of a tile plan as 44 contiguous int64 on the CPU",
        ),
        (
            lambda header, blob: [header.to("meta"), blob],
            "header of a tile plan as 44 contiguous int64 on the CPU",
        ),
        (lambda header, blob: [header, blob.long()], "blob of a tile plan as contiguous int32"),
        (lambda header, blob: [header, blob[::2]], "blob of a tile plan as contiguous int32"),
        (lambda header, blob: [header, blob[None]], "blob of a tile plan as contiguous int32"),
    ],
)
def test_malformed_plans_are_refused(
    change: Callable[..., list[torch.Tensor]], message: str, pattern: CsrPattern
) -> None:
    """The ops of torch.ops.rosa take a plan without the pattern that owns it."""
    module = registered()
    (kernel,) = [k for k in rk.kernels("sddmm") if k.name == "fake/tile"]
    inputs = inputs_of("sddmm", pattern, dtype=torch.bfloat16)
    index = pattern.crow_indices, pattern.col_indices
    plan = change(*pattern.tile_plan.tensors)
    with pytest.raises(ValueError, match=message):
        kernel.run(*index, *inputs.values(), torch.bfloat16, plan)
    assert not module.calls


def test_the_workspace_query_passes_all_operands(pattern: CsrPattern) -> None:
    module = registered()
    index = pattern.crow_indices, pattern.col_indices
    inputs = inputs_of("spmm", pattern)
    plan = pattern.tile_plan.tensors
    got = native_cuda.cuda_workspace_bytes("spmm", "tile", *index, [inputs["b"]], plan, module)
    assert got == BYTES
    (asked,) = module.named("cuda_spmm_workspace_bytes")
    assert asked[-2] == (0, 0, 37, 33, 1, 37)  # c has no memory yet, and the stride order of b
    inputs = inputs_of("sddmm", pattern)
    operands = list(inputs.values())
    assert (
        native_cuda.cuda_workspace_bytes("sddmm", "gather", *index, operands, (), module) == BYTES
    )
    assert module.named("cuda_sddmm_workspace_bytes")[0][2] == ()


# -- the real backend "cuda" -----------------------------------------------------------------------


def test_cuda_kernels_are_always_listed() -> None:
    """A kernel that cannot run here is listed with the reason."""
    for op, variants in (
        ("sddmm", {"cuda/gather", "cuda/tile", "cuda/wgmma"}),
        ("spmm", {"cuda/gather", "cuda/tile"}),
        ("csr_add_", {"cuda"}),
        ("csr_gather", {"cuda"}),
        ("csr_scatter_", {"cuda"}),
    ):
        kernels = [k for k in rk.kernels(op) if k.backend == "cuda"]
        assert {k.name for k in kernels} == variants
        for kernel in kernels:
            assert kernel.devices == {"cuda"}
            assert kernel.unavailable is None or f"unavailable={kernel.unavailable!r}" in repr(
                kernel
            )


@pytest.mark.parametrize(
    ("missing", "module", "cuda", "reason"),
    [
        ("is not built (no _C)", None, "13.0", "is not built (no _C)"),
        (
            None,
            object(),
            "13.0",
            "is not built: CMake found no CUDA compiler (nvcc) for this build",
        ),
        (None, Recorder(), None, "needs a torch with CUDA, got"),
        (None, Recorder(cuda_unavailable="needs a driver"), "13.0", "needs a driver"),
        (None, Recorder(), "13.0", None),
    ],
)
def test_the_reason_why_cuda_is_unavailable(
    missing: str | None,
    module: object,
    cuda: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_cuda, "MISSING", missing)
    monkeypatch.setattr(native_cuda, "MODULE", module)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    got = native_cuda._unavailable()
    assert (got is None) if reason is None else got.startswith(reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cpu_tensors_work_without_cuda(pattern: CsrPattern) -> None:
    inputs = inputs_of("sddmm", pattern)
    assert rk.sddmm(pattern, **inputs).shape == (pattern.nnz,)
    with pytest.raises(RuntimeError, match="cuda/gather runs on cuda tensors, got cpu"):
        rk.sddmm(pattern, **inputs, backend="cuda")


def test_the_stub_declares_every_native_function() -> None:
    """The adapter calls only functions that the stub of the native module declares."""
    if native.MISSING is not None:
        pytest.skip(native.MISSING)
    module = registered()
    pattern = uniform_pattern(9, 9, 0.5)
    inputs = inputs_of("sddmm", pattern)
    rk.sddmm(pattern, **inputs, backend="fake")
    stub = (native_cuda.__file__).replace("backends/native_cuda.py", "_C.pyi")
    with open(stub) as file:
        text = file.read()
    assert all(f"def {name}(" in text for name, _ in module.calls)
    entries = {name for name in dir(native.MODULE) if not name.startswith("_")}
    assert all(f"def {name}(" in text or f"class {name}:" in text for name in entries)


def test_gradients_use_the_backend_of_forward(pattern: CsrPattern) -> None:
    """SpMM's tiles are an exception, because their zeros would spread an Inf in a gradient."""
    module = registered()
    pattern.build_tile_plan(128, 256)
    pattern.T.build_tile_plan(128, 256)
    inputs = inputs_of("sddmm", pattern, dtype=torch.bfloat16)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    rk.sddmm(pattern, **inputs, backend="fake/wgmma").sum().backward()
    assert [call[0] for call in module.named("cuda_sddmm")] == [2]
    assert [call[0] for call in module.named("cuda_spmm")] == [0, 0]
    assert registry.backend_for_gradient("sddmm", "fake/wgmma") == "fake/wgmma"
    assert registry.backend_for_gradient("spmm", "fake/tile") == "fake"
    assert registry.backend_for_gradient("spmm", "cpu/portable") == "cpu/portable"
