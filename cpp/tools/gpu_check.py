#!/usr/bin/env python3
"""Every CUDA kernel against the float64 oracle on nasty patterns, with nothing but torch.

    python cpp/tools/gpu_check.py            # on a machine without pytest
    python cpp/tools/gpu_check.py --small    # few and small cases, for compute-sanitizer

It is no substitute for `pytest -m gpu`, which also tests streams, graphs, errors and threads.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels.testing import LAYOUTS, NASTY, Case, assert_within_bound, make_inputs, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens around vectors, panel lines and chunks.
TOKENS = (1, 7, 8, 33, 64, 65, 130, 512)
SMALL_PATTERNS = ("nnz=0", "corners", "one-full-row", "last-column-only", "powerlaw", "odd-tiles")
SMALL_TOKENS = (8, 33, 130)
# csr_add is csr_add_ on a clone, and has no kernels of its own.
OPS = {"sddmm": "sddmm", "spmm": "spmm", "csr_add_": "csr_add", "csr_gather": "csr_gather"}


def skewed() -> rk.CsrPattern:
    """Rows and columns of very unequal weight, over several tiles, some of them nearly empty."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.rand(700, 1, generator=generator) ** 3
    columns = torch.rand(1, 900, generator=generator) ** 3
    return rk.CsrPattern.from_mask(torch.rand(700, 900, generator=generator) < 0.5 * rows * columns)


def problems(small: bool) -> Iterator[tuple[str, rk.CsrPattern, int, torch.dtype, str]]:
    """(name, pattern, tokens, dtype, layout) of every case."""
    for name, build in {**NASTY, "skewed": skewed}.items():
        if small and name not in SMALL_PATTERNS:
            continue
        pattern = build()
        for dtype in DTYPES:
            for tokens in SMALL_TOKENS if small else TOKENS:
                yield name, pattern, tokens, dtype, "token-major"
            if not small and pattern.nnz:
                for layout in LAYOUTS:
                    yield name, pattern, 65, dtype, layout


def run(op: str, backend: str, pattern: rk.CsrPattern, inputs: dict[str, Tensor]) -> Tensor:
    """One result, which a second call gives bit by bit."""
    call = getattr(rk, op)
    first, second = (call(pattern=pattern, backend=backend, **inputs) for _ in range(2))
    assert torch.equal(first, second) or bool(first.isnan().any()), f"{op}: two runs differ"
    return first.cpu()


def main() -> int:
    """Check all; print what failed and a count per kernel; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few and small cases")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: expected a CUDA device, got none")
        return 1
    passed: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures: list[str] = []
    for registered, op in OPS.items():
        names = [
            kernel.name
            for kernel in rk.kernels(registered)
            if device in kernel.devices and kernel.backend != "reference"
        ]
        for name, pattern, tokens, dtype, layout in problems(arguments.small):
            case = Case(op, *pattern.shape, tokens, pattern.density, dtype)
            inputs = {
                key: LAYOUTS[layout](x) if key in ("a", "b") else x
                for key, x in make_inputs(case, pattern, device).items()
            }
            on_cpu = {key: x.cpu() for key, x in inputs.items()}
            exact = oracle(op, pattern, on_cpu)
            on_device = pattern.to(device)
            for kernel in names:
                try:
                    got = run(op, kernel, on_device, inputs)
                    assert_within_bound(op, got, *exact, on_cpu)
                except (AssertionError, RuntimeError, ValueError) as error:
                    if "asked for explicitly" in str(error):  # it may refuse, with a reason
                        refused[f"{op} {kernel}"] += 1
                        continue
                    where = f"{op} {kernel}, {name}, {tokens} tokens, {dtype}, {layout}"
                    failures.append(f"{where}: {error}")
                    print(failures[-1], flush=True)
                else:
                    passed[f"{op} {kernel}"] += 1
    for kernel in sorted(passed | refused):
        print(f"{kernel}: {passed[kernel]} passed, {refused[kernel]} refused")
    print(f"{passed.total()} passed, {len(failures)} failed")
    if not passed:
        print(f"expected kernels that run on {device}, got none")
    return int(bool(failures) or not passed)


if __name__ == "__main__":
    sys.exit(main())
