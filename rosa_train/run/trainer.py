"""A run between its first step and its last: what the loop of `train` calls, phase by phase."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.scores import forwards
from rosa_kernels.masks.targets import target_shapes
from rosa_train.adapters.attach import set_masks
from rosa_train.adapters.save import save_adapter
from rosa_train.adapters.switch import adapter_targets
from rosa_train.data.order import BatchOrder
from rosa_train.files import replacing
from rosa_train.methods.schedule import learning_rate_factor
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import distributed
from rosa_train.run.evaluate import (
    evaluate_dataset,
    generate_predictions,
    target_count,
    target_loss,
)
from rosa_train.run.metrics import Metrics, PeakMemory
from rosa_train.run.optimizer import add_new_groups, learning_rates, trained_parameters
from rosa_train.run.setup import Run
from rosa_train.run.signals import Interrupted, Signals

# The loss in the mask phase is multiplied by this under fp16, where gradients of single weights
# otherwise underflow. Every score keeps its order under a positive factor.
_FP16_MASK_SCALE = 1024.0


class Trainer:
    """Takes a prepared run through its phases.

    Attributes:
        step: optimizer steps done.
        masked: the sparse branch is there.
        tokens: read in training, padding not counted.
    """

    def __init__(self, run: Run, log: Metrics) -> None:
        self._run, self._log = run, log
        self._device = run.accelerator.device
        self._rank, self._world = run.accelerator.process_index, run.accelerator.num_processes
        self._memory = PeakMemory(self._device)
        self._phase = ""
        self._stop_agreed = False
        self.step, self.masked = run.state.step, run.state.masked
        self.tokens = run.state.tokens
        self._trained = trained_parameters(run.model)
        self._resident = rk.nn.make_resident(run.model, run.adamw) if self.masked else None

    # -- what is due

    def masks_are_due(self) -> bool:
        """Whether the next step is the first with masks."""
        return self.step == self._run.mask_step and not self.masked

    def evaluation_is_due(self) -> bool:
        """Whether there is something to evaluate on, and it is time to."""
        run = self._run
        if run.eval_dataset is None:
            return False
        return self.step == run.steps or _due(self.step, run.train_args.eval_steps)

    def checkpoint_is_due(self) -> bool:
        return _due(self.step, self._run.train_args.save_steps)

    def must_stop(self, signals: Signals) -> bool:
        """Whether a signal ends the run here. Several processes agree on that within a step."""
        return self._stop_agreed or (self._world == 1 and signals.received is not None)

    # -- the phases

    def mask_phase(self) -> None:
        """Chooses the masks. From here on the sparse branch trains, and sits inside the weights."""
        run, saving = self._run, self._run.train_args.save_steps
        if self.step > 0 and saving:
            self.save()  # a process killed in the mask phase has lost nothing
        began = self._enter("mask")
        set_masks(run.model, self._choose_masks())
        self.masked = True
        add_new_groups(run.adamw, run.model, run.method, run.train_args)
        self._trained = trained_parameters(run.model)
        self._resident = rk.nn.make_resident(run.model, run.adamw)
        paths = self._resident.paths
        self._log.write(
            self.step,
            "mask",
            layers=len(paths),
            resident=sum(path == "resident" for path in paths.values()),
            **self._cost(began),
        )
        if saving:
            self.save(just_masked=True)

    def optimizer_step(self, signals: Signals) -> None:
        """One optimizer step on the rows that the seed and the step's number choose."""
        run, dataset, args = self._run, self._run.dataset, self._run.train_args
        began = self._enter("train" if self.masked or run.mask_step is None else "warmup")
        torch.manual_seed(_seed(args.seed, self.step, self._rank))
        factor = learning_rate_factor(
            self.step, run.steps, args.warmup_steps, args.lr_scheduler_type
        )
        for group in run.adamw.param_groups:
            group["lr"] = group["peak_lr"] * factor
        indices = run.order.batch(self.step)
        shares = dataset.share(indices, args.per_device_train_batch_size, self._rank, self._world)
        losses = self._backward(shares, targets=max(sum(dataset.targets[i] for i in indices), 1))
        distributed.reduce_gradients(self._trained)
        loss = self._agree(losses, signals)
        if not math.isfinite(loss):
            bad = [s for s, one in zip(shares, losses, strict=True) if not one.isfinite()]
            raise self._not_finite(f"loss of {loss}", bad)
        limit = args.max_grad_norm or math.inf
        norm = float(run.accelerator.clip_grad_norm_(self._trained, limit))
        if run.accelerator.scaler is None and not math.isfinite(norm):
            raise self._not_finite(f"gradient of norm {norm}", shares)
        run.optimizer.step()
        run.optimizer.zero_grad()
        self.step += 1
        read = sum(dataset.lengths[i] for i in indices)
        self.tokens += read
        cost = self._cost(began)
        self._log.write(
            self.step,
            self._phase,
            loss=loss,
            grad_norm=norm if math.isfinite(norm) else None,  # fp16: the step was skipped
            tokens=self.tokens,
            tokens_per_s=read / cost["seconds"],
            **cost,
            **learning_rates(run.adamw),
        )

    def evaluate(self) -> None:
        """The loss on the evaluation data."""
        run, dataset = self._run, self._run.eval_dataset
        assert dataset is not None
        began = self._enter("eval")
        loss, targets = evaluate_dataset(run.model, dataset, run.train_args, run.accelerator)
        self._log.write(self.step, "eval", loss=loss, targets=targets, **self._cost(began))
        self._log.say(f"step {self.step}: evaluation loss {loss:.4f}")

    def save(self, just_masked: bool = False) -> Path | None:
        """Writes a checkpoint. Returns its folder, on all processes but the first None."""
        run = self._run
        if not run.accelerator.is_main_process:
            return None
        self._log.sync()
        scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else {}
        return checkpoints.save(
            run.out,
            run.model,
            run.adamw,
            checkpoints.State(
                self.step, self.masked, self.tokens, self._log.lines, run.state.arguments, scaler
            ),
            full=run.method.full,
            just_masked=just_masked,
            limit=run.train_args.save_total_limit,
        )

    def interrupted(self, signals: Signals) -> Interrupted:
        """Saves, and returns what to raise."""
        where = self.save() or "a checkpoint"
        distributed.barrier()  # a launcher ends all processes when one has ended
        return signals.interrupted(self.step, where)

    def save_final(self) -> None:
        """The adapter, or the model of full fine-tuning, goes into the run's folder."""
        run = self._run
        if not run.accelerator.is_main_process:
            return
        if run.method.full:
            with replacing(run.final, last="config.json") as folder:
                run.model.save_pretrained(folder)
                run.tokenizer.save_pretrained(folder)
        else:
            base = str(run.model_args.model_name_or_path)
            save_adapter(run.model, run.final, base_model_name_or_path=base)

    def generate(self) -> None:
        """Completes evaluation examples, if the run is to."""
        run, count = self._run, self._run.train_args.generate_examples
        if run.eval_dataset is None or not count:
            return
        began = self._enter("generate")
        examples = run.eval_dataset.examples[:count]
        share = generate_predictions(
            run.model, run.tokenizer, examples, run.out, run.train_args, run.accelerator
        )
        self._log.write(
            run.steps,
            "generate",
            exact_match=share,
            examples=len(examples),
            **self._cost(began),
        )
        self._log.say(f"exact match on {len(examples)} examples: {share:.1%}")

    def leave_weights(self) -> None:
        """Takes S out of the weights, when all processes have come here."""
        distributed.barrier()
        if self._resident is not None:
            self._resident.remove()

    # -- their parts

    def _enter(self, phase: str) -> float:
        """Begins a phase, or goes on with it. Returns the time."""
        if phase != self._phase:
            self._memory.reset()
            self._phase = phase
        return time.perf_counter()

    def _cost(self, began: float) -> dict[str, float]:
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak_bytes": self._memory.bytes()}

    def _backward(self, shares: list[list[int]], targets: int) -> list[Tensor]:
        """Gradients of this process's micro-batches; their parts of the step's mean loss."""
        run, losses = self._run, []
        for share in shares:
            with run.accelerator.autocast():
                loss = target_loss(run.model, run.dataset.collate(share), self._device) / targets
            run.accelerator.backward(loss)
            losses.append(loss.detach())
        return losses

    def _agree(self, losses: list[Tensor], signals: Signals) -> float:
        """The loss over all processes. They learn on the way whether one of them had a signal."""
        totals = torch.tensor([0.0, float(signals.received is not None)], device=self._device)
        for one in losses:
            totals[0] += one
        loss, stop = distributed.all_reduce(totals).tolist()
        self._stop_agreed = bool(stop)
        return float(loss)

    def _choose_masks(self) -> dict[str, rk.CsrPattern]:
        """Algorithm 1 on `mask_steps` steps' worth of rows, in an order of their own."""
        run, accelerator, args = self._run, self._run.accelerator, self._run.method_args
        parallel = distributed.is_parallel()
        # As many batches on every process, which the reduction needs.
        order = BatchOrder(
            len(run.dataset),
            run.train_args.per_device_train_batch_size,
            seed=_seed(run.train_args.seed, "masks"),
            world=self._world,
            rank=self._rank,
        )
        count = args.mask_steps * run.train_args.gradient_accumulation_steps
        scale = 1.0 if accelerator.scaler is None else _FP16_MASK_SCALE
        targets = adapter_targets(run.model)
        passes = forwards(args.mask_score, target_shapes(targets), count, args.mask_bytes())
        if passes > 3 * count:
            self._log.say(
                f"masks: {passes} forwards for {count} batches, as few layers' gradients are "
                "summed at a time; a larger --mask_memory takes fewer"
            )

        def mean_loss(batch: dict[str, Tensor]) -> Tensor:
            with accelerator.autocast():
                loss = target_loss(run.model, batch, self._device)
            return loss * (scale / target_count(batch))

        def mean_over_ranks(tensor: Tensor) -> Tensor:
            return distributed.all_reduce(tensor).div_(self._world)

        return build_masks(
            run.model,
            targets,
            run.allocation.nnz,
            score=args.mask_score,
            batches=[run.dataset.collate(order.batch(index)) for index in range(count)],
            loss_fn=mean_loss,
            scope=args.mask_scope,
            seed=run.train_args.seed,
            memory_bytes=args.mask_bytes(),
            reduce=mean_over_ranks if parallel else None,
            broadcast=distributed.broadcast if parallel else None,
        )

    def _not_finite(self, what: str, bad: list[list[int]]) -> FloatingPointError:
        dataset, saved = self._run.dataset, checkpoints.checkpoints(self._run.out)
        where = "; ".join(dataset.where(indices) for indices in bad) or "a batch of another process"
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
        return FloatingPointError(
            f"train: expected finite numbers, got a {what} at step {self.step + 1} on {where}; "
            f"{last}"
        )


def _seed(*parts: object) -> int:
    """A seed for each use and step, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
