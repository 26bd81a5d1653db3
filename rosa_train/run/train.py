"""The trainer: one loop, from a model and a file of examples to an adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rosa_kernels as rk
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.scores import forwards
from rosa_kernels.masks.targets import target_shapes
from rosa_train.adapters.attach import set_masks
from rosa_train.adapters.save import save_adapter
from rosa_train.adapters.switch import adapter_targets
from rosa_train.config import (
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
    fingerprint,
    flat,
)
from rosa_train.data.dataset import Rows, load_rows
from rosa_train.data.order import BatchOrder
from rosa_train.files import replacing, write_file
from rosa_train.methods.method import method_named
from rosa_train.methods.schedule import learning_rate_factor, plan
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import distributed, metrics
from rosa_train.run.evaluate import evaluate_rows, generate_rows, target_count, target_loss
from rosa_train.run.optimizer import param_groups
from rosa_train.run.setup import (
    attach_method,
    check_fit,
    make_accelerator,
    prepare_folder,
    starting_point,
)
from rosa_train.run.signals import Interrupted, Signals

__all__ = ["Interrupted", "Result", "train"]

# The loss in the mask phase is multiplied by this under fp16, where gradients of single weights
# otherwise underflow. Every score keeps its order under a positive factor.
_FP16_MASK_SCALE = 1024.0


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `losses`: per optimizer step, the mean over its target tokens; of the whole run, resumed or
    not. `eval_losses`: by step. `exact_match`: share of generated completions equal to their
    reference. `seconds` and `peak_bytes`: per phase (warmup, mask, train, eval, generate).
    `tokens`, `tokens_per_s`: read in training, padding not counted. `final`: the adapter, or the
    model of full fine-tuning.
    """

    output_dir: str
    method: str
    steps: int
    trainable: int
    final: str
    losses: list[float] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    exact_match: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def eval_loss(self) -> float | None:
        """The last one."""
        return self.eval_losses[max(self.eval_losses)] if self.eval_losses else None


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    train_args: TrainArguments,
) -> Result:
    """Fine-tunes a causal LM on examples and leaves an adapter (or a model) in `output_dir`.

    An optimizer step minimises the mean cross entropy over all target tokens of its
    `per_device_train_batch_size * gradient_accumulation_steps * processes` rows, exactly as one
    large batch would.

    Everything but the weights and the moments of AdamW is a function of the seed and the step, so
    a run that is resumed from any checkpoint ends, on a CPU, with the bits of an uninterrupted one.

    Raises:
        ValueError: arguments, data or a checkpoint that do not fit, before anything is trained.
        FloatingPointError: a loss or gradient that is not finite; names step, records and the
            last checkpoint.
        Interrupted: SIGINT or SIGTERM, after the step was finished and saved.
        OSError: a checkpoint could not be written; the earlier ones are intact.

    Source: RoSA, arXiv 2401.04679, Algorithm 1 and section 4.
    """
    started = time.perf_counter()
    out = Path(train_args.output_dir)
    accelerator = make_accelerator(train_args)
    device, main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    autocast = accelerator.autocast
    resumed_from = starting_point(out, train_args)
    method = method_named(method_args.method)

    # -- data and model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path
    )
    rows = load_rows(data_args, tokenizer, training=True)
    evaluation = load_rows(data_args, tokenizer, training=False) if data_args.eval_source else None
    step_rows = (
        train_args.per_device_train_batch_size * train_args.gradient_accumulation_steps * world
    )
    order = BatchOrder(len(rows), step_rows, seed=train_args.seed)
    steps = train_args.max_steps
    if steps == -1:
        steps = math.ceil(train_args.num_train_epochs * order.steps_per_epoch)
    method, mask_step = plan(method, method_args.schedule, steps)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    ).to(device)
    check_fit(model, method, rows, data_args, method_args, train_args)

    # -- what decides the weights, which a checkpoint must agree with
    arguments = fingerprint(model_args, data_args, method_args, train_args) | {
        "processes": world,
        "steps": steps,
        "data": rows.digest(),
        "model": checkpoints.digest(model),
    }
    state = checkpoints.State(0, False, 0, 0, arguments)
    if resumed_from is not None:
        state = checkpoints.read_state(resumed_from)
        checkpoints.check_arguments(resumed_from, state, arguments)

    # -- adapters
    allocation = attach_method(model, method, method_args, train_args, resumed_from)
    if model_args.gradient_checkpointing:
        # Renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    groups = partial(
        param_groups,
        model,
        method,
        lora_lr=train_args.learning_rate,
        sparse_lr=train_args.sparse_learning_rate,
        full_lr=train_args.full_learning_rate,
        weight_decay=train_args.weight_decay,
    )
    # SpA has nothing to train until its masks are there.
    waiting = not any(p.requires_grad for p in model.parameters())
    adamw = torch.optim.AdamW(
        [{"params": [], "name": "none", "peak_lr": 0.0}] if waiting else groups(),
        betas=(train_args.adam_beta1, train_args.adam_beta2),
        eps=train_args.adam_epsilon,
        fused=True,  # one pass over the moments; the others make a dozen on a CPU
    )
    optimizer = accelerator.prepare(adamw)
    if resumed_from is not None:
        checkpoints.load_optimizer(model, adamw, resumed_from)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)

    # -- from here on the folder is written to, by the first process
    distributed.barrier()
    if main:
        prepare_folder(out, train_args, resumed_from, state)
        text = json.dumps(flat(model_args, data_args, method_args, train_args), indent=2)
        write_file(out / "args.json", text)
    with closing(
        metrics.Metrics(
            out,
            main=main,
            start=state.step,
            total=steps,
            report_to=train_args.report_to,
            every=train_args.logging_steps,
            progress=not train_args.disable_tqdm,
        )
    ) as log:
        memory = metrics.PeakMemory(device)
        step, masked, tokens, phase = state.step, state.masked, state.tokens, ""
        trained = _trained(model)

        def enter(name: str) -> float:
            nonlocal phase
            if name != phase:
                memory.reset()
                phase = name
            return time.perf_counter()

        def save(just_masked: bool = False) -> Path | None:
            if not main:
                return None
            log.sync()
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            now = checkpoints.State(step, masked, tokens, log.lines, arguments, scaler)
            return checkpoints.save(
                out,
                model,
                adamw,
                now,
                full=method.full,
                just_masked=just_masked,
                limit=train_args.save_total_limit,
            )

        resident = rk.nn.make_resident(model, adamw) if masked else None
        load_seconds = time.perf_counter() - started
        with Signals() as signals:
            while step < steps:
                # -- masks, once
                if step == mask_step and not masked:
                    if step > 0 and train_args.save_steps:
                        save()  # a process killed in the mask phase has lost nothing
                    began = enter("mask")
                    set_masks(
                        model,
                        _masks(
                            model, rows, allocation.nnz, method_args, train_args, accelerator, log
                        ),
                    )
                    masked = True
                    known = {group["name"] for group in adamw.param_groups}
                    for group in groups():
                        if group["name"] not in known:  # Adam's state of the low-rank branch stays
                            adamw.add_param_group(group)
                    trained = _trained(model)
                    resident = rk.nn.make_resident(model, adamw)
                    log.write(
                        step,
                        "mask",
                        layers=len(resident.paths),
                        resident=sum(path == "resident" for path in resident.paths.values()),
                        seconds=time.perf_counter() - began,
                        peak_bytes=memory.bytes(),
                    )
                    if train_args.save_steps:
                        save(just_masked=True)

                # -- one optimizer step
                began = enter("train" if masked or mask_step is None else "warmup")
                torch.manual_seed(_seed(train_args.seed, step, rank))
                factor = learning_rate_factor(
                    step, steps, train_args.warmup_steps, train_args.lr_scheduler_type
                )
                for group in adamw.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                indices = order.batch(step)
                shares = rows.share(indices, train_args.per_device_train_batch_size, rank, world)
                targets = max(sum(rows.targets[i] for i in indices), 1)
                losses = []
                for share in shares:
                    with autocast():
                        loss = target_loss(model, rows.collate(share), device) / targets
                    accelerator.backward(loss)
                    losses.append(loss.detach())
                distributed.reduce_gradients(trained)
                totals = torch.tensor([0.0, float(signals.received is not None)], device=device)
                for loss in losses:
                    totals[0] += loss
                loss_now, stop = distributed.all_reduce(totals).tolist()
                if not math.isfinite(loss_now):
                    bad = [s for s, one in zip(shares, losses, strict=True) if not one.isfinite()]
                    raise _not_finite(out, step, f"loss of {loss_now}", rows, bad)
                norm = float(
                    accelerator.clip_grad_norm_(trained, train_args.max_grad_norm or math.inf)
                )
                if accelerator.scaler is None and not math.isfinite(norm):
                    raise _not_finite(out, step, f"gradient of norm {norm}", rows, shares)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                read = sum(rows.lengths[i] for i in indices)
                tokens += read
                seconds = time.perf_counter() - began
                log.write(
                    step,
                    phase,
                    loss=loss_now,
                    grad_norm=norm if math.isfinite(norm) else None,  # fp16: the step was skipped
                    tokens=tokens,
                    tokens_per_s=read / seconds,
                    seconds=seconds,
                    peak_bytes=memory.bytes(),
                    **_learning_rates(adamw),
                )

                # -- evaluation, checkpoint
                if evaluation is not None and (step == steps or _due(step, train_args.eval_steps)):
                    began = enter("eval")
                    loss_now, targets = evaluate_rows(model, evaluation, train_args, accelerator)
                    seconds = time.perf_counter() - began
                    log.write(
                        step,
                        "eval",
                        loss=loss_now,
                        targets=targets,
                        seconds=seconds,
                        peak_bytes=memory.bytes(),
                    )
                    log.say(f"step {step}: evaluation loss {loss_now:.4f}")
                if _due(step, train_args.save_steps):
                    save()
                if stop or (world == 1 and signals.received is not None):
                    where = save() or "a checkpoint"
                    distributed.barrier()  # a launcher ends all processes when one has ended
                    raise signals.interrupted(step, where)

        # -- the result
        final = out / ("model" if method.full else "adapter")
        if main:
            if method.full:
                with replacing(final, last="config.json") as folder:
                    model.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
            else:
                save_adapter(
                    model, final, base_model_name_or_path=str(model_args.model_name_or_path)
                )
        if evaluation is not None and train_args.generate_examples:
            began = enter("generate")
            examples = evaluation.examples[: train_args.generate_examples]
            share_of_matches = generate_rows(
                model, tokenizer, examples, out, train_args, accelerator
            )
            seconds = time.perf_counter() - began
            log.write(
                steps,
                "generate",
                exact_match=share_of_matches,
                examples=len(examples),
                seconds=seconds,
                peak_bytes=memory.bytes(),
            )
            log.say(f"exact match on {len(examples)} examples: {share_of_matches:.1%}")
    distributed.barrier()
    if resident is not None:
        resident.remove()
    result = Result(
        output_dir=str(out),
        method=method_args.method,
        steps=steps,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        final=str(final),
        **metrics.summary(metrics.read(out / "metrics.jsonl")),
    )
    result.seconds["load"] = load_seconds
    if main:  # last: where it is, the run is complete
        write_file(out / "result.json", json.dumps(dataclasses.asdict(result), indent=2))
    return result


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """By name: a resumed run may hold them in another order, and a sum of norms would differ."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def _seed(*parts: object) -> int:
    """A seed for each use and step, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _masks(
    model: nn.Module,
    rows: Rows,
    nnz: dict[str, int],
    args: MethodArguments,
    train_args: TrainArguments,
    accelerator: Any,
    log: metrics.Metrics,
) -> dict[str, rk.CsrPattern]:
    """Algorithm 1 on `mask_steps` steps' worth of rows, in an order of their own."""
    world, parallel = accelerator.num_processes, distributed.is_parallel()
    # As many batches on every process, which the reduction needs.
    order = BatchOrder(
        len(rows),
        train_args.per_device_train_batch_size,
        seed=_seed(train_args.seed, "masks"),
        world=world,
        rank=accelerator.process_index,
    )
    count = args.mask_steps * train_args.gradient_accumulation_steps
    scale = 1.0 if accelerator.scaler is None else _FP16_MASK_SCALE
    targets = adapter_targets(model)
    passes = forwards(args.mask_score, target_shapes(targets), count, args.mask_bytes())
    if passes > 3 * count:
        log.say(
            f"masks: {passes} forwards for {count} batches, as few layers' gradients are summed at "
            "a time; a larger --mask_memory takes fewer"
        )

    def mean_loss(batch: dict[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            loss = target_loss(model, batch, accelerator.device)
        return loss * (scale / target_count(batch))

    return build_masks(
        model,
        targets,
        nnz,
        score=args.mask_score,
        batches=[rows.collate(order.batch(index)) for index in range(count)],
        loss_fn=mean_loss,
        scope=args.mask_scope,
        seed=train_args.seed,
        memory_bytes=args.mask_bytes(),
        reduce=(lambda tensor: distributed.all_reduce(tensor).div_(world)) if parallel else None,
        broadcast=distributed.broadcast if parallel else None,
    )


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`learning_rate` is the low-rank branch's, or of what trains instead of it."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    names = ("lora_a", "lora_b", "sparse", "full", "full_no_decay")
    found = {"learning_rate": next(rates[name] for name in names if name in rates)}
    if "sparse" in rates:
        found["sparse_learning_rate"] = rates["sparse"]
    return found


def _not_finite(out: Path, step: int, what: str, rows: Rows, bad: list[list[int]]) -> Exception:
    where = "; ".join(rows.where(indices) for indices in bad) or "a batch of another process"
    saved = checkpoints.checkpoints(out)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
    return FloatingPointError(
        f"train: expected finite numbers, got a {what} at step {step + 1} on {where}; {last}"
    )
