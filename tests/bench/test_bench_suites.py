"""The benchmark's suites: they cover the targets, and begin with the most informative cases."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.measuring.names import dtype_name

pytest.importorskip("numpy")

from bench import masks
from bench.report import targets
from bench.suites import cases, cpu, cuda

DEVICES = ("cpu", "cuda")


def row_of(case) -> dict:
    """The columns of a row that describe its case."""
    names = ("op", "m", "n", "k", "density", "mask")
    return {name: getattr(case, name) for name in names} | {"dtype": dtype_name(case.dtype)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", cases.SUITES)
def test_suites_have_distinct_cases_with_contenders(name, device):
    suite = cases.suite(name, device=device)
    names = [cases.case_id(case) for case in suite]
    assert len(names) == len(set(names)) > 0
    for case in suite[:20]:
        assert cases.contenders(case, device)


def test_the_density_suite_covers_the_targets_points():
    got = {(c.op, c.mask, c.density) for c in cases.suite("density") if c.k == 2048}
    for op in ("sddmm", "spmm"):
        for mask in ("uniform", "q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"):
            for density in (0.001, 0.003, 0.005, 0.01, 0.02, 0.05):
                assert (op, mask, density) in got
    assert ("csr_add_", 0.006) in {(c.op, c.density) for c in cases.suite("density")}


@pytest.mark.parametrize("device", DEVICES)
def test_the_rosa_suite_pairs_real_and_uniform_masks(device):
    suite = cases.suite("rosa", device=device)
    problems = {(c.op, c.m, c.n, c.k, c.density, c.dtype) for c in suite if c.mask == "uniform"}
    real = [c for c in suite if c.mask.startswith("real:")]
    assert len({c.mask for c in real}) == 21
    for c in real:
        assert (c.op, c.m, c.n, c.k, c.density, c.dtype) in problems
        own = masks.real(c.mask.removeprefix("real:")).shape
        assert c.m % own[0] == c.n % own[1] == 0


def test_the_gpu_suites_cover_the_targets_points():
    sddmm = {
        (c.mask, c.m, c.n, c.k, c.density)
        for c in cases.suite("density", device="cuda")
        if (c.op, c.dtype) == ("sddmm", torch.bfloat16)
    }
    for m, n in ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)):
        for k in (2048, 8192, 16384):
            for density in (0.003, 0.006, 0.01, 0.02):
                assert {(kind, m, n, k, density) for kind in masks.KINDS} <= sddmm
            for density in (0.0005, 0.001, 0.01, 0.1):
                assert ("uniform", m, n, k, density) in sddmm
    decoding = {(c.mask, c.k) for c in cases.suite("tokens", device="cuda") if c.op == "spmm"}
    for k in (1, 2, 4, 8, 16, 32, 64):
        assert {("uniform", k), ("q_proj", k), ("gate_proj", k), ("down_proj", k)} <= decoding


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.what)
def test_every_target_has_cases_in_quick_too(target):
    every = [case for name in cases.SUITES for case in cases.suite(name, device="cuda")]
    assert sum(target.applies(row_of(case)) for case in every) >= 3
    assert any(target.applies(row_of(case)) for case in cases.suite("quick", device="cuda"))


def test_the_most_informative_cases_come_first():
    density = cases.suite("density", device="cuda")
    tenth = density[: len(density) // 10]
    # The first tenth has a whole curve of uniform masks and every kind of layer.
    assert {c.density for c in tenth if c.mask == "uniform"} >= set(cuda.UNIFORM)
    assert {c.mask for c in tenth} >= set(masks.KINDS)
    rosa = cases.suite("rosa", device="cuda")[:15]
    assert {c.mask for c in rosa} >= {f"real:14.{kind}" for kind in masks.KINDS}


def test_the_first_suite_has_one_layers_real_masks():
    *real, last = cases.suite("first", device="cuda")
    assert real[0].mask == "real:14.q_proj"
    assert {c.mask for c in real} == {f"real:14.{kind}" for kind in masks.KINDS}
    assert {(c.op, c.k, c.dtype) for c in real} == {("sddmm", 8192, torch.bfloat16)}
    assert all(c.m * c.n >= targets.LEAST_SIZE for c in real)
    assert last == dataclasses.replace(real[0], mask="uniform")
    assert len(real) == 7


def test_the_second_suite_has_the_remaining_cases():
    first, second = (cases.suite(name, device="cuda") for name in ("first", "second"))
    sddmm = [c for c in second if c.op == "sddmm"]
    assert len(sddmm) == 14
    assert len({c.mask for c in [*first, *sddmm]} - {"uniform"}) == 21
    assert not set(first) & set(second)
    decoding = {(c.mask, c.k) for c in second if c.op == "spmm"}
    assert decoding >= {(f"real:14.{kind}", k) for kind in masks.KINDS for k in (1, 8, 64)}
    assert decoding >= {("uniform", k) for k in (1, 8, 64)}
    assert {c.op for c in second[:10]} == {
        *("sddmm", "spmm", "csr_add_", "csr_gather", "csr_scatter_")
    }
    assert {c.density for c in second if c.op == "csr_add_"} == {0.006}


def test_cpu_suites_have_no_gpu_sizes():
    for suite in (cpu.tokens(0), cpu.llm(0)):
        for case in suite:
            assert 2 * case.m * case.n * case.k <= 3e10  # a dense GEMM takes half a second at most


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"suite: expected one of quick, first, .*, got 'fast'"):
        cases.suite("fast")
