"""From the roofs of a CUDA run to the rates of the cost model behind `auto`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from rosa_kernels.backends.machine import machine_of, save_calibration

from ..measuring.results import ResultsError, Row

# Which rate a roof measures, and the column it is a rate of; launches are times.
_RATES = {
    "roof/copy": ("hbm", "bytes"),
    "roof/read_l2": ("l2", "bytes"),
    "roof/bfloat16": ("gemm16", "flops"),
    "roof/float32": ("gemm32", "flops"),
    "roof/launch": ("launch", None),
}


def calibrate(rows: Iterable[Row], path: Path | None = None) -> tuple[Path, dict[str, float]]:
    """Keep the roofs of a run on CUDA as this device's rates; where, and which.

    They go to `path`, for ROSA_MACHINE, or to the user's cache, where they are found unasked.

    Raises:
        ResultsError: rows without a roof that was measured on CUDA.
    """
    measured: dict[str, float] = {}
    name = ""
    for row in rows:
        if row["device"] != "cuda" or row["status"] != "ok" or row["case"] not in _RATES:
            continue
        rate, column = _RATES[row["case"]]
        if rate == "gemm32" and row["allow_tf32"]:
            continue  # not float32 arithmetic
        measured[rate] = row["median_s"] if column is None else row[column] / row["median_s"]
        name = row["device_name"]
    if not measured:
        raise ResultsError("calibrate: expected roofs that were measured on CUDA, got none")
    return save_calibration(name, measured, path), measured


def adopt(rows: Iterable[Row], path: Path) -> None:
    """Have `auto` and predictions use what the roofs measured, for the rest of this process."""
    before = os.environ.get("ROSA_MACHINE")
    try:
        _, measured = calibrate(rows, path)
        os.environ["ROSA_MACHINE"] = str(path)
        machine_of.cache_clear()
        machine_of(torch.cuda.current_device())  # refuses rates that cannot be
    except Exception as error:  # costs the better rates, not the run
        if before is None:
            os.environ.pop("ROSA_MACHINE", None)
        else:
            os.environ["ROSA_MACHINE"] = before
        machine_of.cache_clear()
        path.unlink(missing_ok=True)  # what is refused here would be refused wherever it is named
        print(f"calibrate: rates stay as they were: {error}")
        return
    print(f"Calibrated by {path}:", *(f"{rate} {value:.4g}" for rate, value in measured.items()))
