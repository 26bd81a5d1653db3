"""Results are accurate with any number of threads, and equal with the same number.

Most tests leave out emulated kernels, which have no threads and would need minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import NASTY, uniform_pattern

OPS = ("sddmm", "spmm", "csr_add", "csr_add_", "csr_gather")


def has_threads(kernel: Served) -> bool:
    return not kernel.emulated


@pytest.fixture(scope="module")
def big() -> CsrPattern:
    """Rows of unequal size, with enough work that every kernel uses three threads."""
    share = torch.linspace(0, 0.5, 400)[
        torch.randperm(400, generator=torch.Generator().manual_seed(1))
    ]
    uniform = torch.rand(400, 500, generator=torch.Generator().manual_seed(2))
    return CsrPattern.from_mask(uniform < share[:, None])


@pytest.mark.ops(*OPS, where=has_threads)
@sweep(threads=[1, 2, 3], k=[7, 50])
def test_results_are_accurate_with_1_to_3_threads(
    kernel: Served, big: CsrPattern, threads: int, k: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    inputs = inputs_of(kernel.op, big, k, dtype, kernel.device)
    check(kernel, big, inputs)


@pytest.mark.ops(*OPS, where=has_threads)
@sweep(threads=[1, 2, 3])
def test_equal_thread_counts_give_equal_bits(kernel: Served, big: CsrPattern, threads: int) -> None:
    torch.set_num_threads(threads)
    results = []
    for _ in range(4):
        inputs = inputs_of(kernel.op, big, 50, kernel.dtype, kernel.device)
        results.append(kernel(big.to(kernel.device), **inputs))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.ops("sddmm", "spmm", where=has_threads)
@sweep(nasty=NASTY, threads=[2, 3])
def test_more_threads_than_rows_or_tokens(kernel: Served, nasty: CsrPattern, threads: int) -> None:
    torch.set_num_threads(threads)
    check(kernel, nasty, inputs_of(kernel.op, nasty, 40, kernel.dtype, kernel.device))


def test_gradients_do_not_depend_on_the_calling_thread(big: CsrPattern) -> None:
    def gradient() -> torch.Tensor:
        torch.set_num_threads(1)
        inputs = {n: x.requires_grad_() for n, x in inputs_of("sddmm", big, 20).items()}
        rk.sddmm(big, **inputs).sum().backward()
        return inputs["b"].grad

    here = gradient()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(gradient).result(), here)


@pytest.mark.ops(
    "sddmm", "spmm", "csr_add", "csr_gather",
    where=lambda kernel: (kernel.op, kernel.backend) != ("sddmm", "simt/gather"),
)  # fmt: skip
@sweep(threads=[1, 2])
def test_two_concurrent_callers_get_right_results(
    kernel: Served, big: CsrPattern, threads: int
) -> None:
    """Both callers allocate and free workspaces, and get the same results as alone."""
    jobs = [inputs_of(kernel.op, big, k, kernel.dtype, kernel.device, seed=k) for k in (20, 33, 64)]
    start = threading.Barrier(2)

    def work(order: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)  # the number is that of the calling thread
        start.wait()
        return [kernel(big.to(kernel.device), **inputs) for inputs in jobs[::order] * 3][::order]

    torch.set_num_threads(threads)
    alone = [kernel(big.to(kernel.device), **inputs) for inputs in jobs] * 3
    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(work, 1), pool.submit(work, -1)]
        for caller in callers:
            for got, expected in zip(caller.result(), alone, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda p: (p.T.T.T.col_indices, p.transpose_permutation, p.row_swizzle),
        lambda p: (p.tile_plan.blob,),
    ],
    ids=["structure", "tile plan"],
)
def test_two_threads_derive_structure_of_one_pattern(read: Callable[[CsrPattern], tuple]) -> None:
    """Both threads build the same structure. Whichever result is kept is right."""
    for seed in range(5):
        pattern = uniform_pattern(200, 300, 0.05, seed=seed)
        start = threading.Barrier(2)

        def build(pattern: CsrPattern = pattern, start: threading.Barrier = start) -> tuple:
            start.wait()
            return read(pattern)

        with ThreadPoolExecutor(2) as pool:
            first, second = [f.result() for f in [pool.submit(build), pool.submit(build)]]
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        assert pattern.T.T.nnz == pattern.nnz


@pytest.mark.ops(
    "sddmm", "spmm", dtypes=[torch.float32],
    where=lambda kernel: kernel.device == "cpu" and has_threads(kernel),
)  # fmt: skip
def test_the_gil_is_released(kernel: Served) -> None:
    """Another thread runs Python in the middle half of the call. CUDA launches return at once."""
    pattern = uniform_pattern(600, 600, 0.2).to(kernel.device)
    inputs = inputs_of(kernel.op, pattern, 1000, device=kernel.device)
    kernel(pattern, **inputs)
    for _ in range(5):  # the system may run both threads on one core for a while
        seen: list[float] = []
        running = threading.Event()
        call: list[float] = []

        def work(call: list[float] = call, running: threading.Event = running) -> None:
            torch.set_num_threads(1)
            running.set()
            call.append(time.perf_counter())
            kernel(pattern, **inputs)
            call.append(time.perf_counter())

        thread = threading.Thread(target=work)
        thread.start()
        running.wait()
        while thread.is_alive():
            seen.append(time.perf_counter())
        begin, end = call
        quarter = (end - begin) / 4
        if any(begin + quarter < t < end - quarter for t in seen):
            return
    pytest.fail(f"no Python ran during {end - begin:.3f} s of {kernel.backend}")
