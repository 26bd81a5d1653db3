"""Synthetic result rows, with made-up times, for the tests of tables, ratios and plots."""

from __future__ import annotations

from bench.measuring import results
from bench.measuring.names import FROM_TOKEN_MAJOR


def a_row(**columns) -> results.Row:
    """A timed row of a synthetic run. `ms` is its median; p20 and p80 are 2 % below and above."""
    ms = columns.pop("ms", 1.0)
    row = dict.fromkeys(results.COLUMNS) | {
        "schema_version": results.SCHEMA_VERSION,
        "run_id": "run-1",
        "utc": "2026-01-02T03:04:05Z",
        "argv": ["run"],
        "device": "cpu",
        "device_name": "Test CPU",
        "threads": 2,
        "torch": "2.13.0",
        "case": "a case",
        "op": "spmm",
        "m": 4096,
        "n": 4096,
        "k": 2048,
        "density": 0.01,
        "nnz": 167772,
        "dtype": "float32",
        "mask": "uniform",
        "seed": 0,
        "kernel": "auto",
        "backend": "cpu/avx2",
        "mode": "no_grad",
        "charge": FROM_TOKEN_MAJOR,
        "status": "ok",
        "samples_s": [ms / 1e3] * 3,
        "median_s": ms / 1e3,
        "p20_s": ms / 1e3 * 0.98,
        "p80_s": ms / 1e3 * 1.02,
        "calls_per_sample": 1,
        "flops": 10**9,
        "bytes": 10**7,
        "output_bytes": 10**6,
        "peak_bytes": 2 * 10**6,
        "max_err": 1e-7,
    }
    return row | columns


def failed(status: str, **columns) -> results.Row:
    """A row without a time, whose reason is "because"."""
    return a_row(**columns) | {
        "status": status,
        "reason": "because",
        **dict.fromkeys(("samples_s", "median_s", "p20_s", "p80_s")),
    }


# The rates of the synthetic GPU: bytes per s from memory and from L2, FLOP/s by dtype.
_RATES = {"bytes": 4e12, "l2": 5e12, "float32": 50e12, "bfloat16": 700e12, "float16": 700e12}


def gpu_rows(gpu_cases) -> list[results.Row]:
    """Rows of a GPU that does not exist, one per case and kernel. A formula gives their times."""
    common = {"device": "cuda", "device_name": "Synthetic GPU", "run_id": "synthetic"}
    roof = {"op": "roof", "m": None, "n": None, "density": None, "charge": "op", **common}
    rows = [
        a_row(**roof, kernel="copy", case="roof/copy", bytes=10**9, flops=None, ms=0.25),
        a_row(**roof, kernel="read_l2", case="roof/read_l2", bytes=10**9, flops=None, ms=0.2),
        a_row(**roof, kernel="launch", case="roof/launch", bytes=None, flops=None, ms=0.002),
    ]
    for case in gpu_cases:
        nnz = round(case.m * case.n * case.density)
        dtype = str(case.dtype).removeprefix("torch.")
        for kernel, seconds in _synthetic_times(case, nnz, dtype).items():
            backend = {"auto": "cuda/tile", "rosa-dense": "dense"}.get(kernel, kernel)
            rows.append(
                a_row(
                    **{"op": case.op, "m": case.m, "n": case.n, "k": case.k, "dtype": dtype},
                    **{"density": case.density, "nnz": nnz, "mask": case.mask, "case": str(case)},
                    **{"kernel": kernel, "backend": backend, "ms": seconds * 1e3, **common},
                    charge=FROM_TOKEN_MAJOR if case.op in ("sddmm", "spmm") else "op",
                    flops=2 * nnz * case.k,
                    bytes=2 * (case.m + case.n) * case.k + 6 * nnz,
                    output_bytes=2 * nnz,
                    workspace_bytes=(case.m + case.n) * case.k,
                    peak_bytes=2 * case.m * case.n if kernel == "dense" else 8 * nnz,
                )
            )
    return rows


def _synthetic_times(case, nnz: int, dtype: str) -> dict[str, float]:
    traffic = 2 * (case.m + case.n) * case.k / _RATES["bytes"]
    if case.op not in ("sddmm", "spmm"):
        scattered = 64 * nnz / _RATES["bytes"] + 2e-6
        return {"auto": scattered, "cuda": scattered, "torch-scatter": 3 * scattered}
    gather = 2 * nnz * case.k / _RATES["l2"] + traffic + 3e-6
    heavy = 0.1 if case.mask != "uniform" else 1.0
    dense = 2 * case.m * case.n * case.k / _RATES[dtype] + traffic + 4e-6
    tile = heavy * dense + traffic + 8e-6
    own = {"cuda/gather": gather, "cuda/tile": tile, "rosa-dense": 1.1 * dense}
    peers = {"dense": dense, "cusparse": 9 * gather, "sputnik_style-trimmed": 4 * gather}
    return {"auto": min(own.values()), **own, **peers, "sputnik_style": 6 * gather}
