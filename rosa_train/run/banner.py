"""What a run says on stderr before its first step, so that a log shows what is being trained."""

from __future__ import annotations

import torch

from rosa_train.adapters.switch import adapter_targets
from rosa_train.run.setup import Run
from rosa_train.run.trainer import SAVE_SECONDS


def banner(run: Run) -> str:
    """The model, what of it trains, the data, the steps, the device, and what is saved where."""
    lines = {
        "model": f"{run.model_args.model_name_or_path}, {_dtype(run)}, on {_device(run)}",
        "targets": _targets(run),
        "trainable": _trainable(run),
        "examples": _examples(run),
        "steps": _steps(run),
        "checkpoints": _checkpoints(run),
        "result": f"{run.final}; metrics.jsonl beside it has a line for each step",
    }
    body = [f"  {name:<12} {text}" for name, text in lines.items()]
    return "\n".join([f"Training with {run.method_args.method}", *body])


def trainable_count(run: Run) -> int:
    """The number of parameters that train in the end. Those of masks may not be there yet."""
    present = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return present + (0 if run.state.masked else sum(run.allocation.nnz.values()))


def _trainable(run: Run) -> str:
    count = trainable_count(run)
    # Without the branches of the adapter, which are parameters, too.
    there = 0 if run.method.full else run.allocation.trainable
    if not run.state.masked:
        there -= sum(run.allocation.nnz.values())
    base = sum(p.numel() for p in run.model.parameters()) - there
    return f"{count:,} parameters, {count / base:.2%} of the model's {base:,}"


def _targets(run: Run) -> str:
    if run.method.full:
        return "all parameters"
    names = list(adapter_targets(run.model))
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    saved = run.method_args.modules_to_save or []
    also = f"; {', '.join(saved)} as a whole" if saved else ""
    return f"{len(names)} layers ({', '.join(kinds)}){also}"


def _examples(run: Run) -> str:
    count = len(run.dataset.examples)
    said = f"{count:,} to train"
    if len(run.dataset) != count:
        said += f" in {len(run.dataset):,} packed rows"
    if run.eval_dataset is None:
        return f"{said}, none to evaluate (--eval_file)"
    return f"{said}, {len(run.eval_dataset.examples):,} to evaluate"


def _steps(run: Run) -> str:
    args, world = run.train_args, run.accelerator.num_processes
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    said = f"{run.steps:,} of {rows} rows"
    if run.state.step or run.state.masked:
        said += f", the first {run.state.step:,} of them done"
    if run.mask_step is not None and not run.state.masked:
        said += f"; masks are chosen after step {run.mask_step:,}"
    return said


def _checkpoints(run: Run) -> str:
    every, kept = run.train_args.save_steps, run.train_args.save_total_limit
    if every == 0:
        return "none (--save_steps 0)"
    said = f"every {every:,} steps" if every else f"every {SAVE_SECONDS / 60:.0f} minutes"
    if run.mask_step is not None:
        said += " and at the masks"
    return f"{said}, in {run.out}; {f'the newest {kept} are' if kept else 'all are'} kept"


def _dtype(run: Run) -> str:
    said = str(run.model.dtype).removeprefix("torch.")
    mixed = run.train_args.mixed_precision
    return said if mixed == "no" else f"{said} with {mixed} autocast"


def _device(run: Run) -> str:
    device, world = run.accelerator.device, run.accelerator.num_processes
    said = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        said = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        said = str(device)
    return said if world == 1 else f"{said}, {world} processes"
