"""A GPU's rates for the cost model. Each rate is marked as measured or estimated."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch

_FORMAT = "rosa_kernels.Machine"
_VERSION = 1
MEASURED, ESTIMATED = "measured", "estimated"


@dataclass(frozen=True)
class Machine:
    """A GPU's sizes and rates, in bytes, FLOP and seconds.

    Attributes:
        name: the device's name.
        capability: the compute capability (major, minor).
        multiprocessors, l2_bytes: number of multiprocessors and bytes of L2, from the device's
            properties.
        hbm: bytes/s of a copy in HBM, read plus written.
        l2: bytes/s from L2 to all multiprocessors.
        gemm16, gemm32: FLOP/s of torch.mm with 16-bit operands and in true float32.
        tile16, wgmma16: FLOP/s of the tile kernels if operands arrive in time. tile16 is through
            mma.sync, wgmma16 through wgmma.
        launch: seconds from one kernel of a stream to the next.
        source: "measured" or "estimated", for each rate.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    hbm: float
    l2: float
    gemm16: float
    gemm32: float
    tile16: float
    wgmma16: float
    launch: float
    source: Mapping[str, str] = field(repr=False, hash=False, default_factory=dict)

    @property
    def tile(self) -> tuple[int, int]:
        """The default tile (rows, columns) of a plan for this machine."""
        return (128, 256) if self.capability == (9, 0) else (128, 128)

    @property
    def calibrated(self) -> bool:
        """Whether all rates that decide between kernels were measured on this kind of device."""
        return all(self.source.get(rate) == MEASURED for rate in _DECISIVE)


RATES = tuple(f.name for f in fields(Machine) if f.type == "float")
_DECISIVE = ("hbm", "l2", "gemm16", "tile16")


def _sources(*measured: str) -> dict[str, str]:
    return {rate: MEASURED if rate in measured else ESTIMATED for rate in RATES}


# Two rates of the H100 and the H200 are measured: hbm (a copy) and gemm16 (torch.mm of bfloat16).
# All others are estimated. l2 is three quarters of 32 bytes per clock and multiprocessor. tile16 is
# 60 % of the GEMM's rate, which is what mma.sync reaches on Hopper. wgmma16 is 85 % of that rate.
_H200 = Machine(
    "H200",
    (9, 0),
    132,
    50 << 20,
    hbm=4.3e12,
    l2=5.5e12,
    gemm16=780e12,
    gemm32=50e12,
    tile16=470e12,
    wgmma16=670e12,
    launch=2.5e-6,
    source=_sources("hbm", "gemm16"),
)
_H100 = replace(_H200, name="H100", hbm=3.0e12, gemm16=798e12)
_A100 = Machine(
    "A100",
    (8, 0),
    108,
    40 << 20,
    hbm=1.7e12,
    l2=3.6e12,
    gemm16=250e12,
    gemm32=17e12,
    tile16=220e12,
    wgmma16=220e12,
    launch=2.5e-6,
    source=_sources(),
)
MACHINES = {machine.name: machine for machine in (_H200, _H100, _A100)}

# FLOP per clock and multiprocessor, by compute capability, from the vendor's data sheets. The first
# number is for 16-bit products summed in float32, the second for float32.
_FLOP_PER_CLOCK = {
    (8, 0): (2048, 128),
    (8, 6): (512, 256),
    (8, 9): (1024, 256),
    (9, 0): (4096, 256),
}


def derived(properties: object) -> Machine:
    """A machine that was never measured. Its rates are estimated from torch's device properties."""
    p = properties
    capability = (p.major, p.minor)  # type: ignore[attr-defined]
    sms = p.multi_processor_count  # type: ignore[attr-defined]
    clock = 1e3 * (getattr(p, "clock_rate", 0) or 1.5e6)
    memory = 2e3 * getattr(p, "memory_clock_rate", 0) * getattr(p, "memory_bus_width", 0) / 8
    flop16, flop32 = _FLOP_PER_CLOCK.get(capability, (1024, 256))
    return Machine(
        p.name,  # type: ignore[attr-defined]
        capability,
        sms,
        getattr(p, "L2_cache_size", 0) or 32 << 20,
        hbm=0.85 * memory or 1e12,
        l2=24 * sms * clock,
        gemm16=0.75 * flop16 * sms * clock,
        gemm32=0.75 * flop32 * sms * clock,
        tile16=0.5 * flop16 * sms * clock,
        wgmma16=0.6 * flop16 * sms * clock,
        launch=2.5e-6,
        source=_sources(),
    )


@lru_cache(maxsize=64)
def machine_of(place: int | str) -> Machine:
    """The machine of a CUDA device by its index, or one of MACHINES by its name.

    If a device was calibrated, its measured rates are used: see :func:`load_calibration`.

    Raises:
        ValueError: the name is unknown, or ROSA_MACHINE names a file that is not valid.
    """
    if isinstance(place, str):
        if place not in MACHINES:
            raise ValueError(f"expected a machine among {', '.join(MACHINES)}, got {place!r}")
        return MACHINES[place]
    properties = torch.cuda.get_device_properties(place)
    known = (m for name, m in MACHINES.items() if name in properties.name)
    base = next(known, None) or derived(properties)
    base = replace(base, name=properties.name, multiprocessors=properties.multi_processor_count)
    return load_calibration(base)


def calibration_path(device_name: str) -> Path:
    """The path of the calibration of such a device: ROSA_MACHINE, or a file in the user's cache."""
    if os.environ.get("ROSA_MACHINE"):
        return Path(os.environ["ROSA_MACHINE"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache / "rosa_kernels" / f"machine-{slug}.json"


def save_calibration(
    device_name: str, measured: Mapping[str, float], path: Path | None = None
) -> Path:
    """Write measured rates to `path`, by default where :func:`machine_of` finds them. Return it."""
    path = path or calibration_path(device_name)
    content: dict[str, object] = {"format": _FORMAT, "version": _VERSION, "device": device_name}
    path.parent.mkdir(parents=True, exist_ok=True)
    content["measured"] = dict(measured)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    machine_of.cache_clear()
    return path


def load_calibration(base: Machine) -> Machine:
    """`base` with the rates that were measured on this machine, or `base` if there are none.

    A calibration is valid if it is for such a device and its rates are within a factor of 10 of
    those of `base`. Rates outside that range are most likely in other units. An invalid file in the
    cache is ignored with a warning.

    Raises:
        ValueError: ROSA_MACHINE names a file that is not readable or not valid.
    """
    path = calibration_path(base.name)
    asked_for = bool(os.environ.get("ROSA_MACHINE"))
    try:
        text = path.read_text()
    except OSError as error:
        if asked_for:
            raise ValueError(f"ROSA_MACHINE: expected a readable file, got {error}") from error
        return base
    try:
        return _calibrated(base, text, path)
    except ValueError as error:
        if asked_for:
            raise
        # An invalid file in the cache must not stop a training.
        warnings.warn(f"ignored a calibration: {error}", stacklevel=2)
        return base


def _calibrated(base: Machine, text: str, path: Path) -> Machine:
    where = f"in {path} (delete it, or measure again)"
    try:
        content = json.loads(text)
        head = (content["format"], content["version"], content["device"])
        measured = {str(rate): float(value) for rate, value in content["measured"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected a calibration written by the benchmark {where}") from error
    if head != (_FORMAT, _VERSION, base.name):
        raise ValueError(
            f"expected a {_FORMAT} of version {_VERSION} for {base.name!r}, got {head} {where}"
        )
    for rate, value in measured.items():
        if rate not in RATES:
            raise ValueError(f"expected rates among {', '.join(RATES)}, got {rate!r} {where}")
        usual = getattr(base, rate)
        if not (math.isfinite(value) and usual / 10 <= value <= usual * 10):
            raise ValueError(
                f"expected {rate} from {usual / 10:.3g} to {usual * 10:.3g}, got {value} {where}"
            )
    source = {**base.source, **dict.fromkeys(measured, MEASURED)}
    return replace(base, source=source, **measured)  # type: ignore[arg-type]
