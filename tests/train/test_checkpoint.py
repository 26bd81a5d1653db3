"""Checkpoints: saving, loading, damaged files, and full disks."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rosa_train.run import checkpoint
from rosa_train.run.checkpoint import State, checkpoints, clean, read_state, save
from rosa_train.run.train import train

from .train_runs import arguments, sizes, write_all


class Weights(nn.Module):
    """A small model with a trained, a frozen and an unused parameter."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, rows)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(2))


def trained(rows: int = 4, steps: int = 3) -> tuple[Weights, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Weights(rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        model.first(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(step: int) -> State:
    return State(step, False, 10 * step, step, {"rank": 2})


def put(out: Path, step: int, **options: Any) -> Path:
    return save(out, *trained(), state(step), full=True, **options)


def test_saved_state_weights_and_moments_load_again(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save(tmp_path, model, optimizer, state(3), full=True)
    assert read_state(folder) == state(3)
    other, fresh = trained(steps=0)
    checkpoint.load_weights(other, folder)
    checkpoint.load_optimizer(other, fresh, folder)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, moment in optimizer.state.get(mine, {}).items():
            assert torch.equal(moment, fresh.state[theirs][name])
    # A parameter without a gradient has no moments, and frozen parameters are not saved.
    assert other.unused not in fresh.state
    assert set(load_file(folder / "model.safetensors")) == {"first.weight", "first.bias", "unused"}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    put(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_checkpoints_are_sorted_and_the_oldest_removed(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        put(tmp_path, step, limit=3)
    put(tmp_path, 10, limit=3, just_masked=True)
    names = ["checkpoint-9", "checkpoint-10", "checkpoint-10-masked"]
    assert [path.name for path in checkpoints(tmp_path)] == names
    put(tmp_path, 11, limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]


def test_saving_the_same_step_twice_writes_once(tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    before = (folder / "state.json").stat().st_mtime_ns
    assert put(tmp_path, 1) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for name in (".checkpoint-2.abcd_123", ".checkpoint-2-masked.abcdefgh", ".adapter.12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    (tmp_path / ".metrics.jsonl.abcdefgh").touch()
    kept = [".hidden", ".adapter.d", "checkpoint-x", "notes.txt", ".model.py"]
    for name in kept:
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", *kept}


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    def write_half(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if path.name.startswith(file):
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    message = f"checkpoint-2 could not be saved: .*No space left on device; {first} is intact"
    with pytest.raises(OSError, match=message):
        put(tmp_path, 2, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_safetensors_error_on_full_disk_becomes_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SafetensorError is not an OSError.
    def fail(tensors: Any, path: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    message = r"could not be saved: .*No space left on device.*; there is no earlier one"
    with pytest.raises(OSError, match=message):
        put(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE needs Linux")
def test_file_size_limit_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    # The kernel itself refuses to write, as it does on a full disk.
    import resource
    import signal

    first = put(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match=f"could not be saved: .*too large.*; {first} is intact"):
            put(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    load("model", *trained(), first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a training state, got JSONDecodeError"),
        ("[]", "expected a training state, got TypeError"),
        ("{}", "expected a training state, got KeyError"),
        ('{"format_version": 2}', "expected format version 1, got 2"),
        ('{"format_version": 1, "step": 1}', r"expected the fields \['arguments', .*got"),
    ],
)
def test_invalid_state_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path)


def test_folder_without_a_state_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with state\.json, got"):
        read_state(tmp_path)


def test_differing_arguments_are_listed(tmp_path: Path) -> None:
    checkpoint.check_arguments(tmp_path, {"rank": 2}, {"rank": 2})
    with pytest.raises(ValueError, match=r"rank: 2 there, 3 here\n  seed: None there, 1 here"):
        checkpoint.check_arguments(tmp_path, {"rank": 2}, {"rank": 3, "seed": 1})


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_truncated_file_changes_nothing(file: str, tmp_path: Path) -> None:
    path = put(tmp_path, 1) / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    model, optimizer = trained(steps=1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"{file}.safetensors: expected a safetensors file, got"):
        load(file, model, optimizer, path.parent)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def load(file: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    if file == "model":
        checkpoint.load_weights(model, folder)
    else:
        checkpoint.load_optimizer(model, optimizer, folder)


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_the_weights_of_another_model_are_refused(file: str, tmp_path: Path) -> None:
    folder = put(tmp_path, 1)
    with pytest.raises(ValueError, match=r"expected first.* of shape \(5,.*, got \(4,"):
        load(file, *trained(rows=5), folder)


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_unknown_tensor_names_are_refused(file: str, tmp_path: Path) -> None:
    path = put(tmp_path, 1) / f"{file}.safetensors"
    save_file({f"foreign.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"unexpected \['foreign"):
        load(file, *trained(), path.parent)


def test_missing_moments_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path, 1) / "optimizer.safetensors"
    tensors = load_file(path)
    del tensors["first.bias.step"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing \['step'\], unexpected \[\]"):
        load("optimizer", *trained(), path.parent)


def test_different_models_have_different_digests() -> None:
    assert checkpoint.digest(trained(steps=0)[0]) == checkpoint.digest(trained(steps=0)[0])
    assert checkpoint.digest(trained(steps=0)[0]) != checkpoint.digest(trained(steps=1)[0])
    assert checkpoint.digest(trained(4)[0]) != checkpoint.digest(trained(5)[0])


def test_a_checkpoint_holds_a_usable_adapter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from rosa_train.adapters.load import load_adapter

    source = write_all(tmp_path / "source")
    settings = sizes("rosa") | {"max_steps": 5, "save_steps": 5}
    train(*arguments(source, tmp_path / "out", **settings))
    folder = tmp_path / "out" / "checkpoint-5"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    load_adapter(model, folder / "adapter")
    saved = json.loads((folder / "state.json").read_text())
    assert (saved["step"], saved["masked"], saved["format_version"]) == (5, True, 1)
    # When the masks were set after step 3, Adam kept its state of the low-rank branch. The state
    # of `values` starts there.
    moments = load_file(folder / "optimizer.safetensors")
    steps = {name.split(".")[-2]: int(t) for name, t in moments.items() if name.endswith(".step")}
    assert steps == {"lora_a": 5, "lora_b": 5, "values": 2}
