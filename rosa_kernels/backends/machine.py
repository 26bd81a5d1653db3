"""What the cost model knows of a GPU: a few rates, each measured or estimated, and says which."""

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
    """A GPU, in bytes, FLOP and seconds.

    Attributes:
        name: of the device.
        capability: its compute capability.
        multiprocessors, l2_bytes: what its properties say.
        hbm: bytes/s of a copy, read plus written.
        l2: bytes/s from the second-level cache to all multiprocessors.
        gemm16, gemm32: FLOP/s of torch.mm, 16-bit operands and true float32.
        tile16, wgmma16: FLOP/s of the tile kernels where operands arrive in time: through mma.sync,
            and through wgmma.
        launch: seconds from one kernel of a stream to the next.
        source: for each rate, "measured" or "estimated".
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
        """The tile of the plans that its kernels want."""
        return (128, 256) if self.capability == (9, 0) else (128, 128)

    @property
    def calibrated(self) -> bool:
        """Whether all that decides between the kernels was measured on this kind of device."""
        return all(self.source.get(rate) == MEASURED for rate in _DECISIVE)


RATES = tuple(f.name for f in fields(Machine) if f.type == "float")
_DECISIVE = ("hbm", "l2", "gemm16", "tile16")


def _sources(*measured: str) -> dict[str, str]:
    return {rate: MEASURED if rate in measured else ESTIMATED for rate in RATES}


# Measured: hbm (a copy) and gemm16 (torch.mm of bfloat16) of the H100 and the H200. Estimated: all
# else; l2 as three quarters of 32 bytes a clock and multiprocessor, tile16 as 60 % of the GEMM's
# rate, which is what mma.sync has on Hopper, wgmma16 as 85 % of it.
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

# FLOP a clock and multiprocessor, by compute capability: 16-bit products summed in float32, and
# float32. From the vendor's data sheets.
_FLOP_PER_CLOCK = {
    (8, 0): (2048, 128),
    (8, 6): (512, 256),
    (8, 9): (1024, 256),
    (9, 0): (4096, 256),
}


def derived(properties: object) -> Machine:
    """A machine nobody has measured, from what torch says of the device; all rates estimated."""
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

    A device's own rates come from a calibration, where there is one: see :func:`load_calibration`.

    Raises:
        ValueError: a name that is not known, or a calibration that is not valid.
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
    """Where a calibration of such a device is kept: ROSA_MACHINE, or the user's cache."""
    if os.environ.get("ROSA_MACHINE"):
        return Path(os.environ["ROSA_MACHINE"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache / "rosa_kernels" / f"machine-{slug}.json"


def save_calibration(
    device_name: str, measured: Mapping[str, float], path: Path | None = None
) -> Path:
    """Write measured rates where :func:`machine_of` finds them; returns where that is."""
    path = path or calibration_path(device_name)
    content = {"format": _FORMAT, "version": _VERSION, "device": device_name}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "measured": dict(measured)}, indent=2) + "\n")
    machine_of.cache_clear()
    return path


def load_calibration(base: Machine) -> Machine:
    """`base` with the rates that were measured on this machine, or as it is without any.

    A file is valid if it is one of such a device, and its rates are within a factor of 10 of
    `base`: else they are in other units, most likely. An invalid one in the cache is ignored with a
    warning.

    Raises:
        ValueError: ROSA_MACHINE names a file that is not valid.
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
        # A bad cache must not stop anybody's training.
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
