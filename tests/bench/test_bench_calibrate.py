"""`bench calibrate`: the cost model's rates are taken from the roofs that a run measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_rows import a_row, gpu_rows

from bench.__main__ import main
from bench.measuring import results
from bench.report.calibrate import adopt, calibrate
from rosa_kernels.backends.machine import MEASURED, RATES, machine_of


def test_rates_come_from_the_roofs(tmp_path: Path) -> None:
    path, measured = calibrate(gpu_rows([]), tmp_path / "machine.json")
    assert measured == {"hbm": 4e12, "l2": 5e12, "launch": pytest.approx(2e-6)}
    assert set(measured) <= set(RATES)
    content = json.loads(path.read_text())
    assert content["device"] == "Synthetic GPU"
    assert content["measured"] == measured


def test_a_tf32_roof_gives_no_float32_rate(tmp_path: Path) -> None:
    gemm = gpu_rows([])[0] | {"case": "roof/float32", "flops": 10**12, "median_s": 0.02}
    _, measured = calibrate([gemm | {"allow_tf32": False}], tmp_path / "machine.json")
    assert measured == {"gemm32": pytest.approx(5e13)}
    with pytest.raises(results.ResultsError, match="measured on CUDA"):
        calibrate([gemm | {"allow_tf32": True}], tmp_path / "machine.json")


def test_the_command_writes_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "results.jsonl", tmp_path / "machine.json"
    results.append(rows, gpu_rows([]))
    assert main(["calibrate", str(rows), "--out", str(out)]) == 0
    assert "hbm      4e+12" in capsys.readouterr().out
    assert out.is_file()


def test_a_cpu_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "results.jsonl"
    results.append(rows, [a_row()])
    with pytest.raises(SystemExit):
        main(["calibrate", str(rows)])
    assert "expected roofs that were measured on CUDA, got none" in capsys.readouterr().err


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch):
    """Makes device 0 a synthetic H200 without a calibration. Returns its name."""
    properties = SimpleNamespace(name="Synthetic GPU H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setenv("ROSA_MACHINE", "")  # so that monkeypatch restores it
    machine_of.cache_clear()
    yield properties.name
    machine_of.cache_clear()


def test_a_run_adopts_its_own_roofs(h200: str, tmp_path: Path) -> None:
    assert machine_of(0).source["l2"] != MEASURED
    rows = [row | {"device_name": h200} for row in gpu_rows([])]
    adopt(rows, tmp_path / "machine.json")
    assert os.environ["ROSA_MACHINE"] == str(tmp_path / "machine.json")
    assert machine_of(0).source["l2"] == MEASURED
    assert machine_of(0).l2 == 5e12


def test_impossible_rates_are_not_adopted(
    h200: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"device_name": h200, "median_s": 1e3} for row in gpu_rows([])]
    adopt(rows, tmp_path / "machine.json")
    assert "rates stay as they were: expected hbm from" in capsys.readouterr().out
    assert os.environ["ROSA_MACHINE"] == ""
    assert not (tmp_path / "machine.json").exists()
    assert machine_of(0).source["l2"] != MEASURED
    adopt([], tmp_path / "machine.json")
    assert "expected roofs that were measured on CUDA" in capsys.readouterr().out
