"""On a GPU: streams, graphs, devices, threads, memory. What is computed is in the other files."""

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
    """Heavy tiles beside light entries, rows from empty to cut; on the device, with its plans."""
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(400, 1, generator=generator) ** 4 * torch.rand(1, 1500, generator=generator)
    pattern = CsrPattern.from_mask(torch.rand(400, 1500, generator=generator) < share).to("cuda")
    assert pattern.tile_plan.stats()["light_nnz"] > 0
    assert pattern.T.tile_plan.stats()["tiles"] > 0
    return pattern


def skip_unserved(kernel: Kernel, pattern: CsrPattern) -> None:
    """Where this GPU is not one that the kernel is for."""
    found = rk.explain(kernel.op, pattern, k=64, dtype=torch.bfloat16, backend=kernel.name)
    if found.chosen is None:
        pytest.skip(str(found.candidates[0].reason))


def call_of(
    kernel: Kernel, pattern: CsrPattern, k: int = 300
) -> tuple[Callable, dict[str, Tensor]]:
    """A call of the public op by this kernel's name, and its operands, which it reads each time."""
    skip_unserved(kernel, pattern)
    inputs = inputs_of(kernel.op, pattern, k, torch.bfloat16, "cuda")
    op = getattr(rk, kernel.op)
    return lambda: op(pattern=pattern, **inputs, backend=kernel.name), inputs


def assert_same(kernel: Kernel, got: Tensor, expected: Tensor) -> None:
    """Equal bits; but cuBLAS promises them on one stream only."""
    if kernel.backend == "dense":
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


# -- streams, graphs, threads ------------------------------------------------------------------


def delay() -> None:
    """Some 50 ms of work on the current stream, for mistakes of order to show in."""
    torch.cuda._sleep(10**8)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_a_side_stream_keeps_its_order(kernel: Kernel, pattern: CsrPattern) -> None:
    """Operands are written late on that stream, and the result is read early."""
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
def test_a_graph_is_captured_and_replayed(kernel: Kernel, pattern: CsrPattern) -> None:
    """With other operands in the same memory."""
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
def test_a_plan_is_not_built_during_capture(kernel: Kernel) -> None:
    """auto does without; who insists on slabs or tiles is told what to do."""
    pattern = uniform_pattern(200, 300, 0.05).to("cuda")
    inputs = inputs_of("sddmm", pattern, 128, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    other = uniform_pattern(200, 300, 0.05).to("cuda")
    rk.sddmm(other, **inputs, backend="cuda/gather")  # its code is on the device
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = rk.sddmm(pattern, **inputs)
        with pytest.raises(RuntimeError, match=r"touch pattern\.tile_plan before"):
            rk.sddmm(pattern, **inputs, backend="dense")
    graph.replay()
    assert not pattern.has_tile_plan
    assert_accurate("sddmm", pattern, inputs, out)


@pytest.mark.parametrize("kernel", served(*OPS))
def test_two_threads_at_once(kernel: Kernel, pattern: CsrPattern) -> None:
    """Each on a stream of its own, with workspaces that come and go."""
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
    """torch raises where it would make the host wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", served(*OPS))
def test_the_host_never_waits(kernel: Kernel, pattern: CsrPattern, no_sync: None) -> None:
    call, _ = call_of(kernel, pattern)
    call()
    torch.cuda.set_sync_debug_mode("error")
    call()


@pytest.mark.parametrize("op", ["sddmm", "spmm", "csr_add", "csr_gather"])
def test_the_host_does_not_wait_in_backward(op: str, pattern: CsrPattern, no_sync: None) -> None:
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
def test_adapters_compare_devices_again(kernel: Kernel, pattern: CsrPattern) -> None:
    if kernel.backend == "dense":
        pytest.skip("torch's GEMM compares")
    a, b = inputs_of("sddmm", pattern, 8, torch.bfloat16).values()
    index = pattern.crow_indices, pattern.col_indices
    with pytest.raises(ValueError, match="expected one device"):
        kernel.run(*index, a, b, torch.bfloat16, pattern.tile_plan.tensors)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kernel", served(*OPS))
def test_another_device_than_the_current_one(kernel: Kernel, pattern: CsrPattern) -> None:
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


def test_a_machine_whose_driver_sees_no_device() -> None:
    """CPU kernels go on working; CUDA's are listed as unavailable with the reason."""
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


def test_a_pattern_moves_with_its_plan() -> None:
    """Unless the kernels of this device want other tiles than a CPU's default."""
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
def test_out_of_memory(kernel: Kernel, pattern: CsrPattern) -> None:
    """torch's error, nothing leaked, and the next call works."""
    if kernel.backend == "dense":
        pytest.skip("its slabs may fit what the pool has left")
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
def test_scratch_is_what_was_stated(kernel: Kernel, pattern: CsrPattern) -> None:
    """Beside the result, the workspace and no more."""
    if kernel.backend != "cuda":
        pytest.skip("states none")
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
    rounding = 2 * (2 << 20)  # of the allocator, for two blocks
    assert peak <= stated + again.nbytes + rounding
    assert torch.equal(again, out)


@pytest.mark.parametrize("kernel", served(*PRODUCTS))
def test_no_dense_matrix_is_held(kernel: Kernel) -> None:
    """8192 x 16384 would take 512 MiB in float32."""
    pattern = uniform_pattern(8192, 16384, 0.0005).to("cuda")
    call, _ = call_of(kernel, pattern, 256)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    assert torch.cuda.max_memory_allocated() - before < 200 << 20


# -- what only a GPU can get wrong -----------------------------------------------------------------


@pytest.mark.parametrize("kernel", served(*OPS))
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (5, 7)])
@pytest.mark.parametrize("k", [0, 3])
def test_nothing_to_launch(kernel: Kernel, shape: tuple[int, int], k: int) -> None:
    """A grid of no blocks is an error of CUDA's, which may also show at the next launch."""
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
def test_more_lines_of_tokens_than_a_grid_has(kernel: Kernel) -> None:
    """gridDim.y ends at 65,535; of bfloat16, a line is 64 tokens."""
    pattern = uniform_pattern(3, 4, 0.7).to("cuda")
    k = 64 * 65_540
    call, inputs = call_of(kernel, pattern, k)
    assert_accurate(kernel.op, pattern, inputs, call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [20_000, 70_000])
def test_the_gemm_of_dense_sums_in_float32(dtype: torch.dtype, k: int) -> None:
    """Few rows and many tokens are what cuBLAS splits, and then adds in the result's dtype."""
    pattern = uniform_pattern(64, 96, 0.3).to("cuda")
    inputs = inputs_of("sddmm", pattern, k, dtype, "cuda")
    for out_dtype in (dtype, torch.float32):
        got = rk.sddmm(pattern, **inputs, out_dtype=out_dtype, backend="dense")
        assert_accurate("sddmm", pattern, inputs, got)


def test_float32_is_float32_under_every_setting() -> None:
    """TF32 is torch's to allow, for its own products."""
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


def test_float64_is_served() -> None:
    """By the oracle: the kernels of tensor cores and of float32 sums have no part in it."""
    pattern = uniform_pattern(30, 40, 0.2).to("cuda")
    inputs = inputs_of("sddmm", pattern, 64, torch.float64, "cuda")
    assert_accurate("sddmm", pattern, inputs, rk.sddmm(pattern, **inputs))
    with pytest.raises(RuntimeError, match="takes dtypes bfloat16, float16, float32, got float64"):
        rk.sddmm(pattern, **inputs, backend="cuda/gather")


@pytest.mark.parametrize("op", PRODUCTS)
def test_compiled_whole(op: str, pattern: CsrPattern) -> None:
    """Forward and backward, by the kernel that eager takes."""
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
def test_explain_tells_what_auto_takes(op: str, k: int, pattern: CsrPattern, sandbox: None) -> None:
    """A log around every kernel."""
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
