"""Prepares a run before its first step: device, data, model, checks, adapter, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    ModelArguments,
    TrainArguments,
    expect,
    fingerprint,
    flat,
)
from rosa_train.data.dataset import Dataset, read_dataset
from rosa_train.data.order import BatchOrder
from rosa_train.files import write_json
from rosa_train.methods.budget import Allocation, allocate
from rosa_train.methods.method import Method, method_named
from rosa_train.methods.schedule import plan
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import distributed, metrics
from rosa_train.run.folder import FolderLock, finished_arguments, prepare_folder, starting_point
from rosa_train.run.optimizer import make_adamw
from rosa_train.run.packing import why_not_packed


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step.

    Attributes:
        model_args, method_args, train_args: the run's options.
        accelerator: accelerate's device, processes, autocast and gradient scaler.
        out: the output folder.
        tokenizer, dataset, eval_dataset: the data. eval_dataset may be None.
        order: the rows that each step takes.
        steps: the number of optimizer steps of the whole run.
        method: the method, with the branches that train in the end.
        mask_step: masks are chosen after this many steps. None means never.
        model, allocation: the model with its adapter, and each layer's rank and nonzeros.
        adamw, optimizer: AdamW, and the same as accelerate wraps it.
        state: the state from which the run starts.
        complete: whether the run in the folder is complete, so that nothing is left to train.
    """

    model_args: ModelArguments
    method_args: MethodArguments
    train_args: TrainArguments
    accelerator: Any
    out: Path
    tokenizer: Any
    dataset: Dataset
    eval_dataset: Dataset | None
    order: BatchOrder
    steps: int
    method: Method
    mask_step: int | None
    model: Any
    allocation: Allocation
    adamw: torch.optim.Optimizer
    optimizer: Any
    state: checkpoints.State
    complete: bool

    @property
    def final(self) -> Path:
        """The folder of the result, an adapter or a model."""
        return self.out / ("model" if self.method.full else "adapter")


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    train_args: TrainArguments,
    lock: FolderLock,
) -> Run:
    """Prepares everything before the first step. The folder is written last, if all is well."""
    out = Path(train_args.output_dir)
    accelerator = make_accelerator(train_args)
    if accelerator.is_main_process:
        lock.take_if_there()
    finished = finished_arguments(out, train_args)
    resumed_from = starting_point(out, train_args) if finished is None else None
    method = method_named(method_args.method)

    # -- data and model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path
    )
    dataset = read_dataset(data_args, tokenizer, training=True)
    eval_dataset = None
    if data_args.eval_source:
        eval_dataset = read_dataset(data_args, tokenizer, training=False)
    order, steps = order_and_steps(len(dataset), train_args, accelerator.num_processes)
    method, mask_step = plan(method, method_args.schedule, steps)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    ).to(accelerator.device)
    check_fit(model, method, dataset, data_args, method_args, train_args)
    if data_args.packing:
        reason = why_not_packed(model, accelerator.device, accelerator.autocast)
        expect(
            reason is None,
            "packing", "a model that keeps packed examples apart",
            f"{type(model).__name__}: {reason}; leave --packing out",
        )  # fmt: skip

    # -- the arguments that decide the weights, which must equal the checkpoint's
    arguments = fingerprint(model_args, data_args, method_args, train_args) | {
        "processes": accelerator.num_processes,
        "steps": steps,
        "data": dataset.digest(),
        "model": checkpoints.digest(model),
    }
    state = checkpoints.State(0, False, 0, 0, arguments)
    if finished is not None:
        checkpoints.check_arguments(out, finished, arguments)
    if resumed_from is not None:
        state = checkpoints.read_state(resumed_from)
        checkpoints.check_arguments(resumed_from, state.arguments, arguments)
        state = replace(state, arguments=arguments)

    # -- what trains
    allocation = attach_method(model, method, method_args, train_args, resumed_from)
    if model_args.gradient_checkpointing:
        # The method was renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    adamw = make_adamw(model, method, train_args)
    optimizer = accelerator.prepare(adamw)
    if resumed_from is not None:
        checkpoints.load_optimizer(model, adamw, resumed_from)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)

    # -- the first process writes the folder
    distributed.barrier()
    if accelerator.is_main_process and finished is None:
        lock.take_before_writing(train_args, resumed_from)
        prepare_folder(out, train_args, resumed_from, state)
        write_json(out / "args.json", flat(model_args, data_args, method_args, train_args))
    return Run(
        model_args=model_args,
        method_args=method_args,
        train_args=train_args,
        accelerator=accelerator,
        out=out,
        tokenizer=tokenizer,
        dataset=dataset,
        eval_dataset=eval_dataset,
        order=order,
        steps=steps,
        method=method,
        mask_step=mask_step,
        model=model,
        allocation=allocation,
        adamw=adamw,
        optimizer=optimizer,
        state=state,
        complete=finished is not None,
    )


def open_metrics(run: Run) -> metrics.Metrics:
    """The run's metrics.jsonl, TensorBoard and progress bar."""
    return metrics.Metrics(
        run.out,
        main=run.accelerator.is_main_process,
        start=run.state.step,
        total=run.steps,
        report_to=run.train_args.report_to,
        every=run.train_args.logging_steps,
        progress=not run.train_args.disable_tqdm,
    )


def order_and_steps(rows: int, args: TrainArguments, world: int) -> tuple[BatchOrder, int]:
    """The rows that each optimizer step takes, and the number of steps."""
    step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    order = BatchOrder(rows, step_rows, seed=args.seed)
    if args.max_steps != -1:
        return order, args.max_steps
    return order, math.ceil(args.num_train_epochs * order.steps_per_epoch)


def make_accelerator(args: TrainArguments) -> Any:
    """Accelerate's Accelerator: device, processes, autocast and gradient scaler."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # accelerate keeps its first setting until the process ends, and raises an error for another. A
    # second run in this process may need another precision or device, so the setting is reset.
    shared = PartialState._shared_state
    alone = shared.get("num_processes", 1) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.use_cpu)
    # On a CPU accelerate would run fp16 without autocast, and would not say so.
    expect(
        args.mixed_precision != "fp16" or accelerator.device.type != "cpu",
        "mixed_precision", "no or bf16 on a CPU", "fp16",
    )  # fmt: skip
    return accelerator


def check_fit(
    model: Any,
    method: Method,
    dataset: Dataset,
    data_args: DataArguments,
    method_args: MethodArguments,
    train_args: TrainArguments,
) -> None:
    """Raises `ValueError` unless model, data and options fit each other."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    expect(
        longest is None or data_args.max_length <= longest,
        "max_length", f"at most the {longest} positions of the model", data_args.max_length,
    )  # fmt: skip
    vocabulary = model.get_input_embeddings().num_embeddings
    expect(
        dataset.largest_id() < vocabulary,
        "tokenizer_name", f"token ids below the {vocabulary} of the model", dataset.largest_id(),
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
    """Attaches a new adapter or the checkpoint's. Returns each layer's rank and nonzeros."""
    saved = args.modules_to_save or []
    targets = find_targets(model, args.targets, args.excluded, saved)
    named = method_named(args.method)  # with both branches, of which a schedule may drop one
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
