"""Behaviour on a GPU: streams, graphs, threads, devices, memory. Other files test results."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import inputs_of
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern, Kernel
from rosa_kernels.backends import native_cuda
from rosa_kernels.testing import assert_accurate, uniform_pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPS = ("sddmm", "spmm", "csr_add_", "csr_gather", "csr_scatter_")
PRODUCTS = ("sddmm", "spmm")


def served(*ops: str) -> list[object]:
    """Each kernel of these ops that takes bfloat16 CUDA tensors, but not the oracle."""
    params = []
    for op in ops:
        for kernel in rk.kernels(op):
            if kernel.backend == "reference" or "cuda" not in kernel.devices:
                continue
            marks = []
            if torch.cuda.is_available() and kernel.unavailable is not None:
                marks.append(pytest.mark.skip(reason=kernel.unavailable))
            params.append(pytest.param(kernel, marks=marks, id=f"{op}-{kernel.name}"))
    return params


@pytest.fixture
def pattern() -> CsrPattern:
    """A pattern on the GPU with heavy tiles, light entries, empty rows and cut rows, with plans."""
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(400, 1, generator=generator) ** 4 * torch.rand(1, 1500, generator=generator)
    pattern = CsrPattern.from_mask(torch.rand(400, 1500, generator=generator) < share).to("cuda")
    assert pattern.tile_plan.stats()["light_nnz"] > 0
    assert pattern.T.tile_plan.stats()["tiles"] > 0
    return pattern


def skip_unserved(kernel: Kernel, pattern: CsrPattern) -> None:
    """Skip the test if the kernel does not serve this GPU."""
    found = rk.explain(kernel.op, pattern, k=64, dtype=torch.bfloat16, backend=kernel.name)
    if found.chosen is None:
        pytest.skip(str(found.candidates[0].reason))


def call_of(
    kernel: Kernel, pattern: CsrPattern, k: int = 300
) -> tuple[Callable, dict[str, Tensor]]:
    """A function that calls the public op on this kernel, and the operands that each call reads."""
    skip_unserved(kernel, pattern)
    inputs = inputs_of(kernel.op, pattern, k, torch.bfloat16, "cuda")
    op = getattr(rk, kernel.op)
    return lambda: op(pattern=pattern, **inputs, backend=kernel.name), inputs


def assert_same(kernel: Kernel, got: Tensor, expected: Tensor) -> None:
    """Bits must be equal, but not for "dense": cuBLAS promises equal bits on one stream only."""
    if kernel.backend == "dense":
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


# -- streams, graphs, threads ------------------------------------------------------------------


def delay() -> None:
    """About 50 ms of work on the current stream, so that a wrong order shows."""
    torch.cuda._sleep(10**8)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_calls_on_a_side_stream_keep_order(kernel: Kernel, pattern: CsrPattern) -> None:
    """The stream writes the operands after a delay and reads the result right after the call."""
    call, inputs = call_of(kernel, pattern)
    kept = {name: x.clone() for name, x in inputs.items()}
    expected = call().clone()
    for name, x in inputs.items():
        x.copy_(kept[name])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in inputs.values():
            x.zero_()
        delay()
        for name, x in inputs.items():
            x.copy_(kept[name])
        got = call().clone()
    stream.synchronize()
    assert_same(kernel, got, expected)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_captured_graphs_replay_with_new_operands(kernel: Kernel, pattern: CsrPattern) -> None:
    """Replays read other operands from the same memory."""
    call, inputs = call_of(kernel, pattern)
    kept = {name: x.clone() for name, x in inputs.items()}
    call()  # warm
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for factor in (1.0, -2.0, 0.5):
        for name, x in inputs.items():
            x.copy_(kept[name] * factor)
        graph.replay()
        got = out.clone()
        for name, x in inputs.items():
            x.copy_(kept[name] * factor)
        assert_same(kernel, got, call())


@pytest.mark.parametrize("kernel", [p for p in served("sddmm") if "gather" in str(p)])
def test_no_plan_is_built_during_graph_capture(kernel: Kernel) -> None:
    """`auto` takes a kernel without a plan. "dense" needs a plan, and its error says what to do."""
    pattern = uniform_pattern(200, 300, 0.05).to("cuda")
    inputs = inputs_of("sddmm", pattern, 128, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    other = uniform_pattern(200, 300, 0.05).to("cuda")
    rk.sddmm(other, **inputs, backend="cuda/gather")  # loads the kernel's code before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = rk.sddmm(pattern, **inputs)
        with pytest.raises(RuntimeError, match=r"touch pattern\.tile_plan before"):
            rk.sddmm(pattern, **inputs, backend="dense")
    graph.replay()
    assert not pattern.has_tile_plan
    assert_accurate("sddmm", pattern, inputs, out)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_two_concurrent_threads_get_right_results(kernel: Kernel, pattern: CsrPattern) -> None:
    """Each thread has its own stream and allocates and frees workspaces."""
    calls = [call_of(kernel, pattern, k) for k in (64, 300, 1000)]
    kept = [{name: x.clone() for name, x in inputs.items()} for _, inputs in calls]
    op = getattr(rk, kernel.op)
    start = threading.Barrier(2)

    def work(order: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        results = []
        start.wait()
        with torch.cuda.stream(stream):
            for inputs in (kept * 5)[::order]:
                own = {name: x.clone() for name, x in inputs.items()}
                results.append(op(pattern=pattern, **own, backend=kernel.name))
        stream.synchronize()
        return results[::order]

    torch.cuda.synchronize()
    alone = [call().clone() for call, _ in calls] * 5
    with ThreadPoolExecutor(2) as pool:
        for caller in [pool.submit(work, 1), pool.submit(work, -1)]:
            for got, expected in zip(caller.result(), alone, strict=True):
                assert_same(kernel, got, expected)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_the_same_call_gives_the_same_bits(kernel: Kernel, pattern: CsrPattern) -> None:
    call, inputs = call_of(kernel, pattern, 2000)
    kept = {name: x.clone() for name, x in inputs.items()}
    results = []
    for _ in range(5):
        for name, x in inputs.items():
            x.copy_(kept[name])
        results.append(call().clone())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Restores the sync debug mode. In mode "error", torch raises if the host would wait."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", served(*OPS))
def test_calls_do_not_synchronize_the_host(
    kernel: Kernel, pattern: CsrPattern, no_sync: None
) -> None:
    call, _ = call_of(kernel, pattern)
    call()
    torch.cuda.set_sync_debug_mode("error")
    call()


@pytest.mark.parametrize("op", ["sddmm", "spmm", "csr_add", "csr_gather"])
def test_backward_does_not_synchronize_the_host(
    op: str, pattern: CsrPattern, no_sync: None
) -> None:
    inputs = inputs_of(op, pattern, 128, torch.bfloat16, "cuda")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    getattr(rk, op)(pattern=pattern, **inputs).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    getattr(rk, op)(pattern=pattern, **inputs).sum().backward()


@pytest.mark.parametrize("op", PRODUCTS)
def test_backward_on_a_side_stream(op: str, pattern: CsrPattern) -> None:
    inputs = inputs_of(op, pattern, 128, torch.bfloat16, "cuda")

    def gradients() -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = getattr(rk, op)(pattern=pattern, **leaves)
        out.backward(torch.ones_like(out))
        return [x.grad for x in leaves.values()]

    expected = gradients()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        delay()
        got = gradients()
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# -- devices -------------------------------------------------------------------------------------


def test_operands_on_other_devices_are_refused(pattern: CsrPattern) -> None:
    inputs = inputs_of("sddmm", pattern, 8, torch.bfloat16, "cuda")
    message = "sddmm: expected b on the pattern's device cuda:0, got cpu"
    with pytest.raises(RuntimeError, match=message):
        rk.sddmm(pattern, inputs["a"], inputs["b"].cpu())
    with pytest.raises(RuntimeError, match=r"sddmm: expected a on the pattern's device cpu, got"):
        rk.sddmm(pattern.to("cpu"), inputs["a"], inputs["b"])


@pytest.mark.parametrize("kernel", served("sddmm"))
def test_adapters_check_the_devices_of_operands(kernel: Kernel, pattern: CsrPattern) -> None:
    if kernel.backend == "dense":
        pytest.skip("torch's GEMM checks the devices")
    a, b = inputs_of("sddmm", pattern, 8, torch.bfloat16).values()
    index = pattern.crow_indices, pattern.col_indices
    with pytest.raises(ValueError, match="expected one device"):
        kernel.run(*index, a, b, torch.bfloat16, pattern.tile_plan.tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernel", served(*OPS))
def test_calls_on_a_device_that_is_not_current(kernel: Kernel, pattern: CsrPattern) -> None:
    there = pattern.to("cuda:1")
    call, inputs = call_of(kernel, pattern)
    kept = {name: x.clone() for name, x in inputs.items()}
    expected = call()
    with torch.cuda.device(0):
        moved = {name: x.to("cuda:1") for name, x in kept.items()}
        got = getattr(rk, kernel.op)(pattern=there, **moved, backend=kernel.name)
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda", 1)
    assert torch.equal(got.to("cuda:0"), expected)


def test_cpu_kernels_work_without_a_visible_gpu() -> None:
    """CPU kernels work. CUDA kernels are listed as unavailable, with the reason."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import torch, rosa_kernels as rk
p = rk.CsrPattern.from_mask(torch.eye(4))
print(rk.sddmm(p, torch.ones(4, 3), torch.ones(4, 3)).tolist())
print({k.unavailable is not None for k in rk.kernels("sddmm") if k.backend == "cuda"})
""",
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.returncode) == ("[3.0, 3.0, 3.0, 3.0]\n{True}\n", 0), done.stderr


def test_tile_plans_move_with_their_pattern() -> None:
    """On compute capability 9.0, whose default tiles differ from a CPU's, a new plan is built."""
    pattern = uniform_pattern(300, 500, 0.05)
    here = pattern.tile_plan
    there = pattern.to("cuda")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert there.has_tile_plan == (not hopper)
    assert there.tile_plan.tile == ((128, 256) if hopper else (128, 128))
    assert there.tile_plan.blob.is_cuda
    assert not there.tile_plan.header.is_cuda
    there.build_tile_plan(128, 128)
    assert torch.equal(there.tile_plan.blob.cpu(), here.blob)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", served(*PRODUCTS))
def test_out_of_memory_leaks_nothing(kernel: Kernel, pattern: CsrPattern) -> None:
    """The call raises torch's error and leaks nothing. The next call works."""
    if kernel.backend == "dense":
        pytest.skip("its slabs may fit into the memory that the pool still has")
    call, _ = call_of(kernel, pattern, 20_000)  # panels of some 60 MB
    expected = call().clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    refused = False
    try:
        call()
    except torch.OutOfMemoryError:  # not pytest.raises, which keeps the frames and their tensors
        refused = True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(call(), expected)


@pytest.mark.parametrize("kernel", served(*PRODUCTS))
def test_a_call_allocates_only_the_stated_workspace(kernel: Kernel, pattern: CsrPattern) -> None:
    """A call allocates its result and the stated workspace, and nothing else."""
    if kernel.backend != "cuda":
        pytest.skip("states no workspace")
    call, inputs = call_of(kernel, pattern, 4096)
    operands = [inputs[name] for name in ("a", "b") if name in inputs]
    index = pattern.crow_indices, pattern.col_indices
    stated = native_cuda.cuda_workspace_bytes(
        kernel.op, kernel.variant, *index, operands, pattern.tile_plan.tensors
    )
    out = call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = call()
    peak = torch.cuda.max_memory_allocated() - before
    rounding = 2 * (2 << 20)  # by the allocator, for two blocks
    assert peak <= stated + again.nbytes + rounding
    assert torch.equal(again, out)


@pytest.mark.parametrize("kernel", served(*PRODUCTS))
def test_no_dense_matrix_is_allocated(kernel: Kernel) -> None:
    """A dense matrix of 8192 x 16384 would take 512 MiB in float32."""
    pattern = uniform_pattern(8192, 16384, 0.0005).to("cuda")
    call, _ = call_of(kernel, pattern, 256)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    assert torch.cuda.max_memory_allocated() - before < 200 << 20


# -- errors that only a GPU can show ---------------------------------------------------------------


@pytest.mark.parametrize("kernel", served(*OPS))
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (5, 7)])
@pytest.mark.parametrize("k", [0, 3])
def test_empty_problems_launch_no_grid(kernel: Kernel, shape: tuple[int, int], k: int) -> None:
    """CUDA refuses a grid without blocks. The error may appear only at the next launch."""
    pattern = uniform_pattern(*shape, 0.0).to("cuda")
    call, _ = call_of(kernel, pattern, k)
    expected = {"sddmm": (0,), "spmm": (shape[0], k), "csr_gather": (0,)}.get(kernel.op, shape)
    assert call().shape == expected
    torch.cuda.synchronize()
    full = uniform_pattern(5, 7, 1.0).to("cuda")
    if kernel.op in PRODUCTS:
        empty_sums, _ = call_of(kernel, full, 0)
        assert not bool(empty_sums().any())
    torch.cuda.synchronize()


@pytest.mark.parametrize("kernel", served(*PRODUCTS))
def test_more_token_lines_than_a_grid_allows(kernel: Kernel) -> None:
    """gridDim.y is at most 65,535. A line of bfloat16 is 64 tokens."""
    pattern = uniform_pattern(3, 4, 0.7).to("cuda")
    k = 64 * 65_540
    call, inputs = call_of(kernel, pattern, k)
    assert_accurate(kernel.op, pattern, inputs, call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [20_000, 70_000])
def test_dense_gemm_accumulates_in_float32(dtype: torch.dtype, k: int) -> None:
    """For few rows and many tokens, cuBLAS splits the sums. It adds parts in the result's dtype."""
    pattern = uniform_pattern(64, 96, 0.3).to("cuda")
    inputs = inputs_of("sddmm", pattern, k, dtype, "cuda")
    for out_dtype in (dtype, torch.float32):
        got = rk.sddmm(pattern, **inputs, out_dtype=out_dtype, backend="dense")
        assert_accurate("sddmm", pattern, inputs, got)


def test_the_tf32_setting_does_not_affect_results() -> None:
    """The setting allows TF32 in torch's own products only."""
    pattern = uniform_pattern(64, 96, 0.3).to("cuda")
    inputs = inputs_of("sddmm", pattern, 512, torch.float32, "cuda")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="dense multiplies float32 in full precision only"):
            rk.sddmm(pattern, **inputs, backend="dense")
        assert_accurate("sddmm", pattern, inputs, rk.sddmm(pattern, **inputs))
    finally:
        matmul.fp32_precision = before
    assert_accurate("sddmm", pattern, inputs, rk.sddmm(pattern, **inputs, backend="dense"))


def test_float64_runs_on_the_reference_kernel() -> None:
    """Kernels that use tensor cores or sum in float32 refuse float64."""
    pattern = uniform_pattern(30, 40, 0.2).to("cuda")
    inputs = inputs_of("sddmm", pattern, 64, torch.float64, "cuda")
    assert_accurate("sddmm", pattern, inputs, rk.sddmm(pattern, **inputs))
    with pytest.raises(RuntimeError, match="takes dtypes bfloat16, float16, float32, got float64"):
        rk.sddmm(pattern, **inputs, backend="cuda/gather")


@pytest.mark.parametrize("op", PRODUCTS)
def test_compiled_and_eager_results_are_equal(op: str, pattern: CsrPattern) -> None:
    """Forward and backward run on the kernels that eager mode takes."""
    torch._dynamo.reset()
    inputs = inputs_of(op, pattern, 128, torch.bfloat16, "cuda")

    def call(**operands: Tensor) -> Tensor:
        return getattr(rk, op)(pattern=pattern, **operands)

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = run(**leaves)
        out.backward(torch.ones_like(out))
        results.append([out, *(x.grad for x in leaves.values())])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("k", [1, 64, 4096])
def test_explain_names_the_kernel_of_auto(
    op: str, k: int, pattern: CsrPattern, sandbox: None
) -> None:
    """A wrapper around every kernel logs its name."""
    taken: list[str] = []
    for kernel in rk.kernels(op):
        object.__setattr__(kernel, "run", _logged(kernel, taken))
    inputs = inputs_of(op, pattern, k, torch.bfloat16, "cuda")
    try:
        getattr(rk, op)(pattern=pattern, **inputs)
        found = rk.explain(op, pattern, k=k, dtype=torch.bfloat16)
        assert taken == [found.chosen.name]
    finally:
        for kernel in rk.kernels(op):
            object.__setattr__(kernel, "run", kernel.run.__wrapped__)


def _logged(kernel: Kernel, taken: list[str]) -> Callable[..., Tensor]:
    run = kernel.run

    def logged(*arguments: object) -> Tensor:
        taken.append(kernel.name)
        return run(*arguments)

    logged.__wrapped__ = run
    return logged
