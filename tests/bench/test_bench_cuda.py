"""The benchmark's CUDA code on machines without a GPU. Functions of torch.cuda are replaced.

These tests show the logic: what is counted, what is skipped, and in which order. Only a GPU can
show that the numbers mean something. test_bench_clocks.py tests the clocks.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numpy")

from bench_cases import FAST, run_bench, small_case

from bench import __main__ as cli
from bench.contenders import dense, sputnik
from bench.contenders.base import Contender, Problem
from bench.measuring import environment, memory, results
from bench.run import plan, roofs, runner, session
from bench.suites import cases
from rosa_kernels.backends import native


def test_peak_memory_on_cuda_is_the_allocators_peak(monkeypatch):
    held = {"now": 1000, "peak": 9000}

    def reset() -> None:
        held["peak"] = held["now"]

    def call() -> str:
        held["peak"] = held["now"] + 500
        held["now"] += 200
        return "result"

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert memory.with_peak(call, "cuda") == ("result", 500)


# -- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "available", "devices"),
    [
        ("auto", False, ["cpu"]),
        ("auto", True, ["cuda", "cpu"]),
        ("cpu", True, ["cpu"]),
        ("cuda", True, ["cuda"]),
    ],
)
def test_auto_includes_a_gpu_if_present(monkeypatch, asked, available, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert plan._devices(asked) == devices


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["run", "--device", "cuda"])
    assert "--device: expected a machine with CUDA, got none" in capsys.readouterr().err


def test_contenders_compete_only_on_devices_they_support():
    case = small_case("sddmm")
    on = {
        device: {contender.name for contender in cases.contenders(case, device)}
        for device in ("cpu", "cuda")
    }
    assert {"auto", "dense", "reference", "torch-sampled", "spops"} <= on["cpu"] & on["cuda"]
    only_cuda = {"cusparse", "cusparse-fp32", "sputnik_style", "sputnik_style-trimmed"}
    assert only_cuda | {"cuda/gather", "cuda/tile", "dense-reduced"} <= on["cuda"] - on["cpu"]
    assert {"numpy", "cpu/portable"} <= on["cpu"] - on["cuda"]


@pytest.fixture
def gpu(monkeypatch) -> list[str]:
    """Simulates a GPU whose cases run on the CPU. Returns the log of cases that ran."""
    ran: list[str] = []

    def run_case(case, competing, rule, device, timer="cold"):
        ran.append(f"{device} {case.op}")
        return run_on_cpu(case, competing, rule)

    run_on_cpu = runner.run_case
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    record = environment.device_record("cpu")
    monkeypatch.setattr(environment, "device_record", lambda device: record | {"device": device})
    monkeypatch.setattr(runner, "warm_up", lambda competing, device: None)
    monkeypatch.setattr(runner, "roof_rows", lambda dtypes, rule, device: [])
    monkeypatch.setattr(runner, "run_case", run_case)
    return ran


OPTIONS = ("--suite", "overhead", "--ops", "sddmm", "spmm")


def test_one_run_covers_two_devices(gpu, tmp_path, capsys):
    assert run_bench(tmp_path, *OPTIONS) == 0
    assert gpu == ["cuda sddmm", "cuda spmm", "cpu sddmm", "cpu spmm"]
    rows = results.read(tmp_path / "results.jsonl")
    assert {row["device"] for row in rows} == {"cpu", "cuda"}
    assert len({row["run_id"] for row in rows}) == 1
    out = capsys.readouterr().out
    assert "cuda: Call overhead in us" in out
    assert "cpu: Call overhead in us" in out


def test_a_budget_is_shared_by_devices_and_suites(gpu, tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(session.time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(
        session.Session, "measure", lambda self, part, end, spent: ends.append((part.suite, end))
    )
    run_bench(tmp_path, "--suite", "overhead", "tokens", "--time-budget", "80")
    # No time is spent here. Of 80 s, the first of the four parts may take a quarter, the second a
    # third, the third half, and the last part all.
    assert [(name, round(end - 1000, 3)) for name, end in ends] == [
        ("overhead", 20),
        ("tokens", pytest.approx(80 / 3, abs=1e-3)),
        ("overhead", 40),
        ("tokens", 80),
    ]


def test_cpu_cases_run_after_the_gpu_is_lost(gpu, tmp_path, monkeypatch, capsys):
    reason = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(
        runner, "lost", lambda device: reason if device == "cuda" and "cuda sddmm" in gpu else None
    )
    assert run_bench(tmp_path, *OPTIONS) == 1
    assert gpu == ["cuda sddmm", "cpu sddmm", "cpu spmm"]
    rows = results.read(tmp_path / "results.jsonl")
    (skipped,) = {row["reason"] for row in rows if row["device"] == "cuda" and row["op"] == "spmm"}
    assert skipped == f"not run: cuda was lost ({reason})"
    assert f"cuda was lost, and its remaining cases were not run: {reason}" in (
        capsys.readouterr().out
    )


def test_a_gpu_is_lost_if_synchronize_fails(monkeypatch):
    def fail() -> None:
        raise RuntimeError("CUDA error: misaligned address\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert runner.lost("cuda") == "CUDA error: misaligned address"
    assert runner.lost("cpu") is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert runner.lost("cuda") is None


def test_nvidia_smi_is_asked_about_torchs_device(monkeypatch):
    for uuid in ("2f9c-11", "GPU-2f9c-11"):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda uuid=uuid: SimpleNamespace(uuid=uuid)
        )
        assert environment._query("clocks.sm")[:4] == [
            *("nvidia-smi", "-i", "GPU-2f9c-11"),
            "--query-gpu=clocks.sm",
        ]


# -- peers ----------------------------------------------------------------------------------------


def test_dense_sums_in_float32_and_restores_torchs_settings(monkeypatch):
    switches = SimpleNamespace(
        allow_bf16_reduced_precision_reduction=True, allow_fp16_reduced_precision_reduction=True
    )
    monkeypatch.setattr(torch.backends.cuda, "matmul", switches)
    seen = []

    def prepare(problem, charge):
        return lambda: seen.append(switches.allow_bf16_reduced_precision_reduction)

    dense._with_reduced(False, prepare)(SimpleNamespace(device="cuda"), "op")()
    dense._with_reduced(True, prepare)(SimpleNamespace(device="cuda"), "op")()
    assert seen == [False, True]
    assert switches.allow_bf16_reduced_precision_reduction
    assert switches.allow_fp16_reduced_precision_reduction


def emulated(monkeypatch):
    """Replaces the native module by one whose CUDA kernels the emulator runs on CPU memory."""
    module = pytest.importorskip("_simt", reason="tests/_simt is not built")
    monkeypatch.setattr(native, "_C", module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "k"), [("sddmm", 9), ("sddmm", 64), ("spmm", 1), ("spmm", 20)])
def test_sputnik_style_peers_are_right_under_both_charges(monkeypatch, op, k, dtype):
    emulated(monkeypatch)
    competing = [contender for contender in sputnik.CONTENDERS if contender.op == op]
    rows = runner.run_case(small_case(op, k, dtype), competing, FAST)
    assert len(rows) == 2 * len(competing)
    for row in rows:
        assert row["status"] == "ok", (row["kernel"], row["charge"], row["reason"])


def test_gpu_roofs_call_our_probes_if_built(monkeypatch):
    emulated(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    one_sm = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: one_sm)
    monkeypatch.setattr(roofs, "_L2_BYTES", 2**14)
    monkeypatch.setattr(roofs, "_L2_PASSES", 2)
    for make in (roofs._read_l2, roofs._launch):
        call, columns = make("cpu")
        call()
        assert columns["backend"] == "cuda"


def test_gpu_roofs_use_torch_without_our_probes(monkeypatch):
    monkeypatch.setattr(native, "_C", SimpleNamespace())
    monkeypatch.setattr(roofs, "_L2_BYTES", 2**14)
    for make in (roofs._read_l2, roofs._launch):
        call, columns = make("cpu")
        call()
        assert "backend" not in columns  # the default backend is torch


def test_memory_held_between_calls_counts_as_workspace():
    class Held:
        workspace_bytes = 4096

        def __init__(self, problem: Problem) -> None:
            self.values = problem.pattern.to_torch(problem.inputs["values"])
            self.b = problem.inputs["b"]

        def __call__(self) -> torch.Tensor:
            return self.values.to_dense() @ self.b

    peer = Contender("spmm", "held", "test", lambda problem, charge: Held(problem))
    rows = runner.run_case(small_case("spmm"), [peer], FAST)
    assert {(row["status"], row["workspace_bytes"]) for row in rows} == {("ok", 4096)}
