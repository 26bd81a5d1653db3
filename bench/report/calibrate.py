"""Turns the roofs of a CUDA run into rates of the cost model behind `auto`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from rosa_kernels.backends.machine import machine_of, save_calibration

from ..measuring.results import ResultsError, Row

# Roof -> the rate that it measures, and the column to divide by its time. A launch is a time.
_RATES = {
    "roof/copy": ("hbm", "bytes"),
    "roof/read_l2": ("l2", "bytes"),
    "roof/bfloat16": ("gemm16", "flops"),
    "roof/float32": ("gemm32", "flops"),
    "roof/launch": ("launch", None),
}


def calibrate(rows: Iterable[Row], path: Path | None = None) -> tuple[Path, dict[str, float]]:
    """Save the roofs of a CUDA run as this device's rates. Returns the file and the rates.

    The file is `path`, which ROSA_MACHINE may name, or the user's cache, which is read by default.

    Raises:
        ResultsError: no row is a roof that was measured on CUDA.
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
    """Let `auto` and the predictions use the measured roofs, for the rest of this process."""
    before = os.environ.get("ROSA_MACHINE")
    try:
        _, measured = calibrate(rows, path)
        os.environ["ROSA_MACHINE"] = str(path)
        machine_of.cache_clear()
        machine_of(torch.cuda.current_device())  # raises if a rate is impossible
    except Exception as error:  # the run goes on with the old rates
        if before is None:
            os.environ.pop("ROSA_MACHINE", None)
        else:
            os.environ["ROSA_MACHINE"] = before
        machine_of.cache_clear()
        path.unlink(missing_ok=True)  # ROSA_MACHINE must not name a refused file
        print(f"calibrate: rates stay as they were: {error}")
        return
    print(f"Calibrated by {path}:", *(f"{rate} {value:.4g}" for rate, value in measured.items()))
