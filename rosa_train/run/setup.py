"""What comes before the first step: device, folder, checks, and what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rosa_kernels.masks.scores import SCORES
from rosa_kernels.masks.targets import find_targets, target_shapes
from rosa_train.adapters.attach import attach
from rosa_train.adapters.load import load_adapter
from rosa_train.config import (
    DataArguments,
    MethodArguments,
    TrainArguments,
    expect,
)
from rosa_train.data.dataset import Rows
from rosa_train.methods.budget import Allocation, allocate
from rosa_train.methods.method import Method, method_named
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import metrics


def make_accelerator(args: TrainArguments) -> Any:
    """Device, processes, autocast and gradient scaler."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps one setting for the life of a process, and refuses another; a second run in
    # this process may have another precision, or device.
    shared = PartialState._shared_state
    alone = shared.get("num_processes", 1) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.use_cpu)
    # Without autocast, in silence, is how accelerate runs it there.
    expect(
        args.mixed_precision != "fp16" or accelerator.device.type != "cpu",
        "mixed_precision", "no or bf16 on a CPU", "fp16",
    )  # fmt: skip
    return accelerator


def starting_point(out: Path, args: TrainArguments) -> Path | None:
    """The checkpoint to go on from, None to begin."""
    wanted = args.resume_from_checkpoint
    if wanted == "last":
        found = checkpoints.checkpoints(out)
        return found[-1] if found else None
    if wanted is not None:
        expect(Path(wanted).is_dir(), "resume_from_checkpoint", "`last` or a folder", wanted)
        return Path(wanted)
    if not args.overwrite_output_dir:
        there = [name for name in _OWN if (out / name).exists()]
        there += [path.name for path in checkpoints.checkpoints(out)]
        expect(
            not there, "output_dir",
            "a folder without a run, --overwrite_output_dir or --resume_from_checkpoint last",
            f"{out} with {', '.join(there)}",
        )  # fmt: skip
    return None


def check_fit(
    model: Any,
    method: Method,
    rows: Rows,
    data_args: DataArguments,
    method_args: MethodArguments,
    train_args: TrainArguments,
) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    expect(
        longest is None or data_args.max_length <= longest,
        "max_length", f"at most the {longest} positions of the model", data_args.max_length,
    )  # fmt: skip
    vocabulary = model.get_input_embeddings().num_embeddings
    expect(
        rows.largest_id() < vocabulary,
        "tokenizer_name", f"token ids below the {vocabulary} of the model", rows.largest_id(),
    )  # fmt: skip
    expect(
        method_args.mask_score in SCORES,
        "mask_score", f"one of {', '.join(sorted(SCORES))}", method_args.mask_score,
    )  # fmt: skip
    expect(
        not (method.full and train_args.mixed_precision == "fp16" and model.dtype != torch.float32),
        "dtype", "float32 for full fine-tuning in fp16, whose gradients are scaled", model.dtype,
    )  # fmt: skip


def attach_method(
    model: nn.Module,
    method: Method,
    args: MethodArguments,
    train_args: TrainArguments,
    resumed_from: Path | None,
) -> Allocation:
    """What trains is there: new, or as the checkpoint has it. Returns what each layer is to get."""
    saved = args.modules_to_save or []
    targets = find_targets(model, args.targets, args.excluded, saved)
    named = method_named(args.method)  # with the branch that a schedule may leave out
    allocation = allocate(
        method,
        target_shapes(targets),
        rank=args.rank if method.low_rank or not named.low_rank else None,
        density=args.density if method.sparse or not named.sparse else None,
        budget=args.budget,
        rank_pattern=dict(args.rank_pattern or {}),  # type: ignore[arg-type]
        density_pattern=dict(args.density_pattern or {}),  # type: ignore[arg-type]
    )
    if resumed_from is not None and not method.full:
        load_adapter(model, resumed_from / "adapter", trainable=True)
        return allocation
    attach(
        model,
        method,
        allocation,
        targets,
        alpha=args.alpha,
        dropout=args.dropout,
        modules_to_save=saved,
        target_modules=args.targets,
        exclude_modules=args.excluded,
        seed=train_args.seed,
    )
    if resumed_from is not None:
        checkpoints.load_weights(model, resumed_from)
    return allocation


# What a run writes into its folder, beside checkpoints.
_OWN = (
    "metrics.jsonl",
    "args.json",
    "predictions.jsonl",
    "result.json",
    "adapter",
    "model",
    "tensorboard",
)


def prepare_folder(
    out: Path, args: TrainArguments, resumed_from: Path | None, state: checkpoints.State
) -> None:
    """The folder is as it was when the checkpoint was written, or has nothing of a run."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(out)
    (out / "result.json").unlink(missing_ok=True)
    if args.overwrite_output_dir:
        for path in [*(out / name for name in _OWN), *checkpoints.checkpoints(out)]:
            if path.is_dir():
                checkpoints.remove(path)
            else:
                path.unlink(missing_ok=True)
    source = out if resumed_from is None else resumed_from.absolute().parent
    metrics.cut(source / "metrics.jsonl", state.metrics_lines, out / "metrics.jsonl")
    if resumed_from is not None and source == out.absolute():
        # Going back to an earlier one: the later ones are of a run that is no more.
        for path in reversed(checkpoints.checkpoints(out)):
            if path.absolute() == resumed_from.absolute():
                break
            checkpoints.remove(path)
