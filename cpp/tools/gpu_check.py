#!/usr/bin/env python3
"""Check every CUDA kernel against the float64 oracle. Needs only torch.

    python cpp/tools/gpu_check.py                                     # all kernels, all cases
    python cpp/tools/gpu_check.py --ops sddmm --kernels cuda/tile     # one family
    python cpp/tools/gpu_check.py --sizes small                       # for compute-sanitizer

Small cases are nasty patterns. Large cases have what small ones never reach: thousands of tokens,
rings that wrap, tiles that stream-K cuts, panels of one MiB, overlapping launches, the hidden sizes
of models. A sample of a large result is compared with the oracle. All of it must be finite, and the
same in four calls.

Lines that begin with INCORRECT name wrong results. The exit status is 0; 2 if a result is
incorrect, a call failed or no case passed; 3 if the device was lost. After an access out of bounds
the device is lost: all later calls of the process fail. This check does not replace `pytest -m
gpu`, which also tests streams, graphs, errors and threads.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels.testing import (
    LAYOUTS,
    NASTY,
    Case,
    assert_within_bound,
    make_inputs,
    oracle,
    uniform_pattern,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (BF16, F16, F32)
# Numbers of tokens near the widths of vectors, panel lines and chunks.
TOKENS = (1, 7, 8, 33, 64, 65, 130, 512)
SMALL_PATTERNS = ("nnz=0", "corners", "one-full-row", "last-column-only", "powerlaw", "odd-tiles")
SMALL_TOKENS = (8, 33, 130)
OPS = ("sddmm", "spmm", "csr_add_", "csr_gather", "csr_scatter_")
PRODUCTS = ("sddmm", "spmm")
IN_PLACE = ("csr_add_", "csr_scatter_")
SIZES = ("small", "nasty", "large")
# Hidden sizes at which operands in shared memory take more than 48 KiB, 64 KiB and so on.
WIDTHS = (2048, 3072, 11008)
WIDTH_TOKENS = (1, 2, 8)
TILES = ((128, 128), (128, 256))
CALLS_IN_A_ROW = 4
SAMPLED_ENTRIES, SAMPLED_ROWS = 4096, 96
# The kernels read these variables at every call. 0 stands for the default.
DEFAULTS = {"ROSA_PANEL_MIB": "0", "ROSA_EARLY_LAUNCH": "0"}
SMALL_PANELS, OVERLAP = {"ROSA_PANEL_MIB": "1"}, {"ROSA_EARLY_LAUNCH": "1"}
# A CPU rehearses the large cases with every edge divided by this.
REHEARSAL = 8
LOST = 3


@dataclass(frozen=True)
class Problem:
    """A case, and the settings of its call."""

    name: str
    op: str
    pattern: rk.CsrPattern
    tokens: int
    dtype: torch.dtype
    layout: str = "token-major"
    variables: dict[str, str] = field(default_factory=dict)
    tile: tuple[int, int] | None = None  # of the plan; None: the device's default
    sampled: bool = False

    def __str__(self) -> str:
        settings = "".join(f", {key}={value}" for key, value in self.variables.items())
        settings += f", tiles {self.tile}" if self.tile else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.tokens} tokens, {dtype}, {self.layout}{settings}"


def skewed(m: int, n: int, density: float) -> rk.CsrPattern:
    """A pattern with very unequal rows and columns: heavy tiles beside scattered entries."""
    generator = torch.Generator().manual_seed(m + n)
    score = torch.rand(m, n, generator=generator)
    score *= torch.rand(m, 1, generator=generator) ** 3
    score *= torch.rand(1, n, generator=generator) ** 3
    kept = max(int(density * m * n), 1)
    return rk.CsrPattern.from_mask(score > score.flatten().kthvalue(m * n - kept).values)


def small_problems(op: str, nasty: bool) -> Iterator[Problem]:
    """Problems with patterns that have broken a sparse kernel before."""
    for name, build in {**NASTY, "skewed": lambda: skewed(700, 900, 0.03)}.items():
        if not nasty and name not in SMALL_PATTERNS:
            continue
        pattern = build()
        for dtype in DTYPES:
            for tokens in (TOKENS if nasty else SMALL_TOKENS) if op in PRODUCTS else (1,):
                yield Problem(name, op, pattern, tokens, dtype)
            if nasty and pattern.nnz:
                for layout in LAYOUTS:
                    if op not in IN_PLACE:
                        yield Problem(name, op, pattern, 65, dtype, layout)


def large_problems(op: str, shrink: int) -> Iterator[Problem]:
    """Problems that small cases never reach. The likeliest to fail come first."""
    edge = 4096 // shrink
    if op not in PRODUCTS:
        pattern = skewed(edge, edge, 0.006)
        yield from (Problem("4096 x 4096", op, pattern, 1, d, sampled=True) for d in DTYPES)
        return
    if op == "spmm":
        for width in WIDTHS:
            pattern = uniform_pattern(1024 // shrink, width, 0.006)
            for dtype in DTYPES:
                for tokens in WIDTH_TOKENS:
                    yield Problem(f"1024 x {width}", op, pattern, tokens, dtype, sampled=True)
    real = skewed(edge, edge, 0.006)
    calls = [
        (8192, BF16, "token-major", {}),
        (8192, BF16, "token-major", OVERLAP),
        (8192, BF16, "token-major", SMALL_PANELS),
        (8192, BF16, "token-major", SMALL_PANELS | OVERLAP),
        (20_000, BF16, "token-major", {}),
        (8192, F16, "token-major", OVERLAP),
        (8192, BF16, "row-major", {}),
        (2048, F32, "token-major", {}),
        (65, BF16, "token-major", {}),  # fewer units of work than multiprocessors
    ]
    if op == "spmm":
        calls = [(64, BF16, "token-major", {}), (512, BF16, "row-major", {}), *calls]
    for tokens, dtype, layout, variables in calls:
        tokens = max(tokens // shrink, 1)
        yield Problem("4096 x 4096", op, real, tokens, dtype, layout, variables, sampled=True)
    for tile in TILES:  # both, whatever the device's default
        for tokens in (8192 // shrink, 65):
            yield Problem("4096 x 4096", op, real, tokens, BF16, tile=tile, sampled=True)
    odd = skewed(edge + 37, 2 * edge + 91, 0.01)  # no edge is a whole tile
    yield Problem("4133 x 8283", op, odd, 8200 // shrink, BF16, sampled=True)
    block = rk.CsrPattern.from_mask(torch.ones(128, 256, dtype=torch.bool))
    yield Problem("one full tile", op, block, 20_000 // shrink, BF16, sampled=True)


def inputs_of(problem: Problem, device: str) -> dict[str, Tensor]:
    """The operands, on the device, in the problem's layout."""
    m, n = problem.pattern.shape
    case = Case(problem.op, m, n, problem.tokens, problem.pattern.density, problem.dtype)
    made = make_inputs(case, problem.pattern, device)
    return {key: LAYOUTS[problem.layout](x) if key in ("a", "b") else x for key, x in made.items()}


def call(
    problem: Problem, kernel: str, pattern: rk.CsrPattern, inputs: dict[str, Tensor]
) -> Tensor:
    """The result of a call. Several calls in a row must give the same bits."""
    op = getattr(rk, problem.op)

    def once() -> Tensor:
        mine = {k: x.clone() if problem.op in IN_PLACE else x for k, x in inputs.items()}
        result = op(pattern=pattern, backend=kernel, **mine)
        return mine["w"] if problem.op in IN_PLACE else result

    os.environ.update(DEFAULTS | problem.variables)
    first, *others = [once() for _ in range(CALLS_IN_A_ROW if problem.sampled else 2)]
    finite = first.isfinite()
    for other in others:
        assert torch.equal(torch.where(finite, first, 0), torch.where(finite, other, 0)), (
            "calls with the same operands differ"
        )
    assert not problem.sampled or bool(finite.all()), "a result of finite operands is not finite"
    return first


def sample(
    problem: Problem, pattern: rk.CsrPattern, inputs: dict[str, Tensor], got: Tensor
) -> tuple[rk.CsrPattern, dict[str, Tensor], Tensor]:
    """A part of a large problem and of its result: some entries of sddmm, or rows of spmm."""
    if not problem.sampled or problem.op not in PRODUCTS or pattern.nnz == 0:
        return pattern, inputs, got
    generator = torch.Generator().manual_seed(problem.tokens)
    rows, cols = pattern.row_indices.long(), pattern.col_indices.long()
    if problem.op == "sddmm":
        some = torch.randperm(pattern.nnz, generator=generator)[:SAMPLED_ENTRIES].sort().values
        some = some.to(got.device)
        return rk.CsrPattern.from_coo(rows[some], cols[some], pattern.shape), inputs, got[some]
    chosen = torch.randperm(pattern.shape[0], generator=generator)[:SAMPLED_ROWS].sort().values
    place = torch.full((pattern.shape[0],), -1)
    place[chosen] = torch.arange(len(chosen))
    new_rows = place.to(got.device)[rows]
    kept = new_rows >= 0
    part = rk.CsrPattern.from_coo(new_rows[kept], cols[kept], (len(chosen), pattern.shape[1]))
    return part, inputs | {"values": inputs["values"][kept]}, got[chosen.to(got.device)]


def check(problem: Problem, kernel: str, device: str) -> None:
    """Raise AssertionError if the kernel's result is wrong. Other errors are the kernel's own."""
    inputs, pattern = inputs_of(problem, device), problem.pattern.to(device)
    if problem.tile is not None:
        pattern.build_tile_plan(*problem.tile)
    got = call(problem, kernel, pattern, inputs)
    part, operands, found = sample(problem, pattern, inputs, got)
    exact = oracle(problem.op, part, operands)
    assert_within_bound(problem.op, found, *exact, operands)


def lost(device: str) -> str:
    """The reason why the device takes no more work, or "" if it works."""
    if device == "cpu":
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def available(op: str, wanted: list[str], device: str, count: Counter[str]) -> list[str]:
    """The kernels of an op on this device, or those of them that `wanted` names.

    `wanted` holds names and backends. A wanted kernel that cannot run in this process has failed,
    because its build may be broken.
    """
    names = []
    for kernel in rk.kernels(op):
        if device not in kernel.devices or kernel.backend in ("reference", "dense"):
            continue
        if wanted and kernel.name not in wanted and kernel.backend not in wanted:
            continue
        if kernel.unavailable is None:
            names.append(kernel.name)
        elif wanted:
            count["failed"] += 1
            print(f"FAILED {op} {kernel.name} {kernel.unavailable}")
    return names


def outcome(problem: Problem, kernel: str, device: str) -> str:
    """Run one check and return its outcome. Failures are printed."""
    case = f"{problem.op} {kernel}, {problem}"
    if problem.sampled:  # if it hangs, the last line says where
        print(f"at {case}", flush=True)
    try:
        check(problem, kernel, device)
    except AssertionError as error:
        print(f"INCORRECT {case}: {error}", flush=True)
        return "incorrect"
    except Exception as error:
        if "asked for explicitly" in str(error):  # a kernel may refuse, with a reason
            return "refused"
        print(f"FAILED {case}: {error}", flush=True)
        return "failed"
    return "passed"


def problems(size: str, op: str, device: str) -> Iterator[Problem]:
    """The cases of a size."""
    if size == "large":
        return large_problems(op, REHEARSAL if device == "cpu" else 1)
    return small_problems(op, nasty=size == "nasty")


def main() -> int:
    """Check what was asked for. Print failures, and counts per op."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["large", "nasty"])
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--until",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no case after this time of time.monotonic(), which all processes share",
    )
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: expected a CUDA device, got none")
        return 2
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{where}, torch {torch.__version__}", flush=True)
    counts = {op: Counter[str]() for op in arguments.ops}
    late = False
    for size, op in product(arguments.sizes, arguments.ops):
        names = available(op, arguments.kernels, device, counts[op])
        for problem in problems(size, op, device) if names else ():
            late = time.monotonic() > arguments.until
            if late:
                print(f"not reached: {op}, {size} cases from {problem} on")
                break
            for kernel in names:
                counts[op][outcome(problem, kernel, device)] += 1
                reason = lost(device)
                if reason:
                    print(f"{device} was lost at {op} {kernel}, {problem}: {reason}")
                    return LOST
    total: Counter[str] = Counter()
    for op, count in counts.items():
        print(f"{op}: {', '.join(f'{number} {what}' for what, number in count.items())}")
        total += count
    print(f"{total['passed']} passed, {total['incorrect']} incorrect, {total['failed']} failed")
    if not total["passed"] + total["incorrect"] + total["failed"]:
        print("nothing was reached" if late else f"no kernel served a case on {device}")
    return 0 if total["passed"] and not total["incorrect"] + total["failed"] else 2


if __name__ == "__main__":
    sys.exit(main())
