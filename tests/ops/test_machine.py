"""Machines: known rates, rates derived from a device, and calibration files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rosa_kernels.backends import machine
from rosa_kernels.backends.machine import MACHINES, RATES, derived, machine_of, save_calibration

NAME = "NVIDIA H200 SXM"


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calibrations on this computer are not read."""
    monkeypatch.delenv("ROSA_MACHINE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_of.cache_clear()
    yield
    machine_of.cache_clear()


def properties(name: str = NAME, **changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "name": name,
            "major": 9,
            "minor": 0,
            "multi_processor_count": 132,
            "L2_cache_size": 50 << 20,
            "clock_rate": 1_980_000,
            "memory_clock_rate": 3_201_000,
            "memory_bus_width": 6144,
            **changes,
        }
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties())


def test_every_rate_has_a_source() -> None:
    for known in MACHINES.values():
        assert set(known.source) == set(RATES)
        assert set(known.source.values()) <= {machine.MEASURED, machine.ESTIMATED}
        assert all(getattr(known, rate) > 0 for rate in RATES)
        assert not known.calibrated
    assert MACHINES["H200"].source["hbm"] == machine.MEASURED
    assert MACHINES["H200"].source["l2"] == machine.ESTIMATED


def test_each_machine_has_its_tile_shape() -> None:
    assert {name: m.tile for name, m in MACHINES.items()} == {
        "H200": (128, 256),
        "H100": (128, 256),
        "A100": (128, 128),
    }


def test_machines_are_found_by_name() -> None:
    assert machine_of("A100").multiprocessors == 108
    with pytest.raises(ValueError, match="expected a machine among H200, H100, A100, got 'H300'"):
        machine_of("H300")


def test_a_known_device_has_its_machines_rates(device: None) -> None:
    found = machine_of(0)
    assert (found.name, found.hbm) == (NAME, MACHINES["H200"].hbm)


@pytest.mark.parametrize(
    ("name", "changes", "rates"),
    [
        # Data-sheet rates: bytes/s and 16-bit FLOP/s. 85 % and 75 % of them are expected.
        ("A100-like", {"major": 8, "multi_processor_count": 108, "clock_rate": 1_410_000,
                       "memory_clock_rate": 1_215_000, "memory_bus_width": 5120},
         (1.555e12, 312e12)),
        ("H100-like", {"clock_rate": 1_830_000, "memory_clock_rate": 2_619_000,
                       "memory_bus_width": 5120}, (3.35e12, 989e12)),
    ],
)  # fmt: skip
def test_unmeasured_devices_have_estimated_rates(
    name: str, changes: dict[str, int], rates: tuple[float, float]
) -> None:
    got = derived(properties(name, **changes))
    assert got.hbm == pytest.approx(0.85 * rates[0], rel=0.02)
    assert got.gemm16 == pytest.approx(0.75 * rates[1], rel=0.02)
    assert set(got.source.values()) == {machine.ESTIMATED}


def test_devices_without_clocks_have_rates() -> None:
    """Older versions of torch report no clocks, and a new architecture has no table entry."""
    bare = SimpleNamespace(name="new", major=13, minor=1, multi_processor_count=200)
    got = derived(bare)
    assert all(getattr(got, rate) > 0 for rate in RATES)
    assert got.l2_bytes > 0


# -- calibration ---------------------------------------------------------------------------------


def test_measured_rates_replace_estimated_rates(device: None) -> None:
    path = save_calibration(NAME, {"l2": 6.1e12, "tile16": 5e14})
    assert path.name == "machine-nvidia-h200-sxm.json"
    found = machine_of(0)
    assert (found.l2, found.tile16, found.hbm) == (6.1e12, 5e14, MACHINES["H200"].hbm)
    assert found.source["l2"] == machine.MEASURED
    assert found.calibrated
    assert machine_of("H200").l2 == MACHINES["H200"].l2  # a machine by name is not this device


def test_rosa_machine_names_the_calibration_file(
    device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_calibration(NAME, {"l2": 6.1e12})
    path = save_calibration(NAME, {"l2": 6.2e12}, tmp_path / "other.json")
    monkeypatch.setenv("ROSA_MACHINE", str(path))
    machine_of.cache_clear()
    assert machine_of(0).l2 == 6.2e12


GOOD = {
    "format": "rosa_kernels.Machine",
    "version": 1,
    "device": NAME,
    "measured": {"hbm": 4.2e12},
}
BAD = {
    "not json": ("{", "a calibration written by the benchmark"),
    "a list": ([], "a calibration written by the benchmark"),
    "no rates": ({**GOOD, "measured": None}, "a calibration written by the benchmark"),
    "words": ({**GOOD, "measured": {"hbm": "fast"}}, "a calibration written by the benchmark"),
    "other device": ({**GOOD, "device": "NVIDIA A100"}, "for 'NVIDIA H200 SXM', got"),
    "other version": ({**GOOD, "version": 2}, "of version 1 for"),
    "other format": ({**GOOD, "format": "x"}, "expected a rosa_kernels.Machine of"),
    "other rate": ({**GOOD, "measured": {"name": 3}}, "expected rates among hbm, l2, gemm16"),
    "other units": ({**GOOD, "measured": {"hbm": 4200}}, r"expected hbm from 4.3e\+11 to"),
    "nan": ({**GOOD, "measured": {"l2": float("nan")}}, r"expected l2 from 5.5e\+11 to"),
    "negative": ({**GOOD, "measured": {"l2": -5e12}}, r"expected l2 from 5.5e\+11 to"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_calibrations_are_ignored_or_refused(
    bad: str, device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad file in the cache is ignored with a warning. In ROSA_MACHINE it is an error."""
    content, message = BAD[bad]
    path = machine.calibration_path(NAME)
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match=f"ignored a calibration: .*{message}"):
        found = machine_of(0)
    assert found == replace(MACHINES["H200"], name=NAME)
    machine_of.cache_clear()
    monkeypatch.setenv("ROSA_MACHINE", str(path))
    with pytest.raises(ValueError, match=message):
        machine_of(0)


def test_a_missing_rosa_machine_file_is_refused(
    device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROSA_MACHINE", "/nowhere/machine.json")
    with pytest.raises(ValueError, match="ROSA_MACHINE: expected a readable file"):
        machine_of(0)
