"""The machine and the versions of a run, as columns of its rows."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .results import SCHEMA_VERSION, Row

_PACKAGE = Path(__file__).resolve().parents[1]


def run_record(argv: list[str]) -> Row:
    """The columns that identify a run."""
    now = datetime.now(UTC)
    sha, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
        "utc": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "git_sha": sha,
        "git_dirty": None if status is None else bool(status),
        "argv": argv,
    }


def device_record(device: str) -> Row:
    """The columns that describe the machine and the versions that decide its speed."""
    cuda = device == "cuda"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _nvidia_smi("driver_version") if cuda else None,
        "triton": _version("triton"),
        "sm_clock_mhz": _clock_under_load() if cuda else None,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def extra_record() -> dict[str, str | None]:
    """What `env` shows in addition to the columns: Python and packages."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "cpu capability of torch": torch.backends.cpu.get_cpu_capability(),
        **{name: _version(name) for name in ("rosa-kernels", "numpy", "scipy", "matplotlib")},
    }


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform.startswith("linux") and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _query(field: str) -> list[str]:
    # Select the GPU by its UUID: CUDA may number devices in another order, and may hide some.
    identity = str(torch.cuda.get_device_properties().uuid)
    name = identity if identity.startswith(("GPU-", "MIG-")) else f"GPU-{identity}"
    return ["nvidia-smi", "-i", name, f"--query-gpu={field}", "--format=csv,noheader,nounits"]


def _nvidia_smi(field: str) -> str | None:
    return _output(*_query(field))


def _clock_under_load() -> float | None:
    """The SM clock of a GPU that multiplies, in MHz. An idle GPU runs at a fraction of it."""
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    with ThreadPoolExecutor(1) as pool:
        clock = pool.submit(_nvidia_smi, "clocks.sm")
        while not clock.done():
            for _ in range(20):
                torch.mm(x, x)
            torch.cuda.synchronize()
    return _number(clock.result())


def _number(text: str | None) -> float | None:
    return float(text) if text and text.replace(".", "", 1).isdigit() else None


def _git(*arguments: str) -> str | None:
    """What git says about the checkout that this code runs from, or None.

    An installed wheel is in no checkout of this project, but may be in one of another project.
    """
    if _PACKAGE.name != "bench":  # installed from the wheel, as rosa_bench
        return None
    return _output("git", "-C", str(_PACKAGE.parent), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
