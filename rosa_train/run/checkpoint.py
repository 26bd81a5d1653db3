"""Training state on the disk. It is written atomically and without pickle.

    checkpoint-<step>/            after that many optimizer steps
    checkpoint-<step>-masked/     the same, right after the masks were chosen
        adapter/                  a complete adapter, from `save_adapter`
        model.safetensors         instead of adapter/ in full fine-tuning: weights by name
        optimizer.safetensors     <parameter>.exp_avg, .exp_avg_sq, .step
        state.json                the step, and the arguments that decide the weights

No state of random generators is saved, because a run carries none. Data order, dropout, learning
rate and masks are functions of the seed and the step. So evaluating or saving changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosa_train.adapters.save import save_adapter
from rosa_train.files import json_text, replacing, write_json

FORMAT_VERSION = 1

_NAME = re.compile(r"checkpoint-(\d+)(-masked)?")
# The names that `replacing`, `remove` and `metrics.cut` use before they finish: ".<name>.<random>".
_LEFTOVER = re.compile(r"\.(checkpoint-\d+(-masked)?|adapter|model|[a-z]+\.jsonl?)\.[a-z0-9_]{8}")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class State:
    """The state of a run at a checkpoint.

    Attributes:
        step: the number of optimizer steps done.
        masked: whether the masks are chosen.
        tokens: the number of tokens read so far.
        metrics_lines: the number of lines of metrics.jsonl.
        arguments: the arguments that decide the weights. A resumed run must have the same.
        scaler: the state of fp16's gradient scaler.
        format_version: the version of this format.
    """

    step: int
    masked: bool
    tokens: int
    metrics_lines: int
    arguments: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def clean(output_dir: Path) -> None:
    """Deletes files and folders that a killed process left half written or half deleted."""
    for leftover in output_dir.iterdir():
        if _LEFTOVER.fullmatch(leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover)
        elif _LEFTOVER.fullmatch(leftover.name):
            leftover.unlink()


def remove(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that no reader sees it half empty."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found[int(match[1]), bool(match[2])] = path
    return [found[key] for key in sorted(found)]


def save(
    output_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    *,
    full: bool,
    just_masked: bool = False,
    limit: int | None = None,
) -> Path:
    """Writes a checkpoint, then deletes the oldest beyond `limit`. Returns its folder.

    Raises:
        OSError: the checkpoint could not be written, for example because the disk is full. The
            earlier ones are intact, and the message names the last of them.
    """
    final = output_dir / f"checkpoint-{state.step}{'-masked' if just_masked else ''}"
    if final in checkpoints(output_dir):  # a signal came right after this step was saved
        return final
    try:
        with replacing(final, last="state.json") as folder:
            if full:
                weights = {
                    name: parameter.detach().contiguous()
                    for name, parameter in model.named_parameters()
                    if parameter.requires_grad
                }
                save_file(weights, folder / "model.safetensors")
            else:
                save_adapter(model, folder / "adapter")
            save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
            write_json(folder / "state.json", dataclasses.asdict(state))
    except (OSError, SafetensorError) as error:
        earlier = checkpoints(output_dir)
        intact = f"{earlier[-1]} is intact" if earlier else "there is no earlier one"
        raise OSError(f"checkpoint: {final} could not be saved: {error}; {intact}") from error
    for old in checkpoints(output_dir)[: -limit if limit else 0]:
        remove(old)
    return final


def read_state(folder: Path) -> State:
    """The state of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, or is unreadable or of another version.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a folder with state.json, got {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path}: expected a training state, got {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint: {path}: expected format version {FORMAT_VERSION}, got {version}"
        )
    names = {f.name for f in dataclasses.fields(State)}
    if set(values) != names:
        raise ValueError(
            f"checkpoint: {path}: expected the fields {sorted(names)}, got {sorted(values)}"
        )
    return State(**values)


def check_arguments(folder: Path, there: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` with a table of differences, unless the arguments equal those there."""
    # The saved arguments went through JSON, which makes lists of tuples, and strings of keys.
    now = json.loads(json_text(arguments))
    differing = sorted(
        name for name in now.keys() | there.keys() if now.get(name) != there.get(name)
    )
    if differing:
        rows = "\n".join(
            f"  {name}: {there.get(name)!r} there, {now.get(name)!r} here" for name in differing
        )
        raise ValueError(
            f"--resume_from_checkpoint: expected the arguments of {folder}, got others:\n{rows}"
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a full fine-tuning checkpoint into the model, in place."""
    path = folder / "model.safetensors"
    saved = _load(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _same_names(path, saved, trained)
    for name, tensor in saved.items():
        _same_shape(path, name, tensor, trained[name])
    with torch.no_grad():
        for name, tensor in saved.items():
            trained[name].copy_(tensor)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restores the optimizer's moments, by the names of the parameters."""
    path = folder / "optimizer.safetensors"
    saved = _load(path)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = {
        names[id(parameter)]: parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        name, _, moment = key.rpartition(".")
        states.setdefault(name, {})[moment] = tensor
    # A parameter without a gradient so far has no moments. An unknown name is an error.
    _same_names(path, states, {name: parameters[name] for name in states if name in parameters})
    for name, moments in states.items():
        _same_names(path, moments, dict.fromkeys(_MOMENTS))
        for moment in _MOMENTS[:2]:
            _same_shape(path, f"{name}.{moment}", moments[moment], parameters[name])
    for name, moments in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            moment: tensor.to(parameter.device) for moment, tensor in moments.items()
        }


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint: {path}: expected a safetensors file, got {error}") from error


def _same_names(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"checkpoint: {path}: missing {missing or 'nothing'}, unexpected {extra}")


def _same_shape(path: Path, name: str, saved: Tensor, expected: Tensor) -> None:
    if saved.shape != expected.shape:
        raise ValueError(
            f"checkpoint: {path}: expected {name} of shape {tuple(expected.shape)}, "
            f"got {tuple(saved.shape)}"
        )


def digest(model: nn.Module) -> str:
    """A hash of names, shapes and the first 64 weights of each tensor, to recognise the base model.

    A hash of all weights would read gigabytes at every start.
    """
    state = hashlib.sha256()
    for name, parameter in model.named_parameters():
        state.update(f"{name} {tuple(parameter.shape)}".encode())
        state.update(repr(parameter.detach().flatten()[:64].tolist()).encode())
    return state.hexdigest()[:16]
