"""Training on two processes with gloo gives the result of one process with twice the batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rosa_train.run import distributed, metrics
from rosa_train.run.checkpoint import checkpoints

from .train_runs import ROOT, Runs, sizes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo here", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def on_two(runs: Runs, log: Path, source: Path, out: Path, **changes: Any) -> list[int]:
    """Starts a run on two processes as torchrun does; returns their exit statuses."""
    port = free_port()
    pids = []
    for rank in range(2):
        env = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {name: str(value) for name, value in env.items()}
        pids.append(runs.start(log, source, out, env=env, **changes))
    return [runs.wait(pid) for pid in pids]


# Masks by squared gradients depend on how rows are split into batches. Masks by mean gradients
# do not.
SAME = {"dropout": 0.0, "mask_score": "grad_mean", "max_steps": 7, "generate_examples": 5}


@pytest.mark.parametrize("method", ["rosa", "full"])
def test_two_processes_equal_one_with_double_batch(
    method: str, runs: Runs, source: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = SAME | sizes(method)
    settings |= {
        "eval_file": str(source / "eval.jsonl"),
        "max_new_tokens": 4,
        "learning_rate": 1e-3,
    }
    log, one, two = (tmp_path / name for name in ("log", "one", "two"))
    half = settings | {"per_device_train_batch_size": 2}
    assert on_two(runs, log, source, two, **half) == [0, 0], log.read_text()
    assert runs(log, source, one, **settings) == 0, log.read_text()
    for first, second in zip(
        *(metrics.read(out / "metrics.jsonl") for out in (one, two)), strict=True
    ):
        assert (first["step"], first["phase"]) == (second["step"], second["phase"])
        assert first.keys() == second.keys()
        for name in first.keys() & {"loss", "grad_norm", "exact_match", "tokens", "targets"}:
            assert second[name] == pytest.approx(first[name], rel=2e-4), first
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    expected, got = load_file(one / name), load_file(two / name)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        # AdamW divides by the root of the second moment. If a gradient is near zero, a difference
        # in its last bits moves the weight by up to the learning rate.
        torch.testing.assert_close(got[key], tensor, rtol=1e-2, atol=2e-3)


def test_processes_end_with_the_same_weights_and_resume(
    runs: Runs, source: Path, tmp_path: Path
) -> None:
    settings = sizes("rosa") | {"max_steps": 6, "save_steps": 4, "save_total_limit": None}
    log, out = tmp_path / "log", tmp_path / "out"
    whole = settings | {"_digests": str(tmp_path)}
    assert on_two(runs, log, source, out, **whole) == [0, 0], log.read_text()
    first, second = (tmp_path / f"weights-{rank}.txt" for rank in range(2))
    assert first.read_text() == second.read_text()
    assert len(set(first.read_text().split())) == 3  # steps with masks
    # Each process has its own dropout, and a resumed run repeats it.
    again = tmp_path / "again"
    resumed = settings | {"resume_from_checkpoint": str(out / "checkpoint-3")}
    assert on_two(runs, log, source, again, **resumed) == [0, 0], log.read_text()
    name = "adapter/adapter_model.safetensors"
    expected, got = load_file(out / name), load_file(again / name)
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    names = ["checkpoint-3", "checkpoint-3-masked", "checkpoint-4"]
    assert [path.name for path in checkpoints(again)] == names


def test_resuming_with_another_process_count_is_refused(
    runs: Runs, source: Path, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    settings = sizes("lora") | {"max_steps": 2, "save_steps": 2}
    assert runs(log, source, out, **settings) == 0, log.read_text()
    again = settings | {"resume_from_checkpoint": "last"}
    assert on_two(runs, log, source, out, **again) == [1, 1]
    assert "processes: 1 there, 2 here" in log.read_text()


def test_one_process_reduces_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    distributed.reduce_gradients([parameter])
    assert parameter.grad is None
    tensor = torch.ones(3)
    assert distributed.all_reduce(tensor) is tensor
    assert distributed.broadcast(tensor) is tensor
    distributed.barrier()
    assert not distributed.is_parallel()


def test_gradient_buckets_have_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 40)
    sizes = [5, 5, 1, 20, 3]
    parameters = [torch.zeros(size) for size in sizes] + [torch.zeros(2, dtype=torch.bfloat16)]
    buckets = [[p.numel() for p in bucket] for bucket in distributed._buckets(parameters)]
    assert buckets == [[5, 5], [1], [20], [3], [2]]


@pytest.mark.slow
def test_training_under_torchrun(source: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from train.train_runs import arguments, sizes\n"
        "from rosa_train.run.train import train\n"
        f"source, out = Path({str(source)!r}), Path({str(tmp_path / 'out')!r})\n"
        "train(*arguments(source, out, max_steps=5, **sizes('rosa')))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port()}", str(script)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(metrics.read(tmp_path / "out" / "metrics.jsonl")) == 6  # 5 steps and the mask phase
