"""The phases of a run as methods, which the loop of `train` calls."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_train.adapters.attach import set_masks
from rosa_train.adapters.save import save_adapter
from rosa_train.files import replacing
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import distributed
from rosa_train.run.evaluate import evaluate_dataset, generate_predictions
from rosa_train.run.mask_phase import choose_masks
from rosa_train.run.metrics import Metrics, PeakMemory
from rosa_train.run.optimizer import add_new_groups, learning_rates, trained_parameters
from rosa_train.run.setup import Run
from rosa_train.run.signals import Interrupted, Signals
from rosa_train.run.step import (
    backward,
    check_evaluation,
    check_loss,
    clip_gradients,
    seed_of,
    set_learning_rates,
)

# Without `save_steps` a checkpoint is due after these seconds. A kill then loses 10 minutes at
# most. A checkpoint of an adapter takes less than a second, and one of a whole model a minute.
SAVE_SECONDS = 600.0


class Trainer:
    """Takes a prepared run through its phases.

    Attributes:
        step: the number of optimizer steps done.
        masked: whether the masks are chosen, so that the sparse branch trains.
        tokens: the number of tokens read in training, without padding.
    """

    def __init__(self, run: Run, log: Metrics) -> None:
        self._run, self._log = run, log
        self._device = run.accelerator.device
        self._rank, self._world = run.accelerator.process_index, run.accelerator.num_processes
        self._memory = PeakMemory(self._device)
        self._phase = ""
        self._stop_agreed = False
        self._saved_at = time.monotonic()
        self.step, self.masked = run.state.step, run.state.masked
        self.tokens = run.state.tokens
        self._trained = trained_parameters(run.model)
        self._resident = rk.nn.make_resident(run.model, run.adamw) if self.masked else None

    # -- what is due

    def masks_are_due(self) -> bool:
        """Whether the next step is the first with masks."""
        return self.step == self._run.mask_step and not self.masked

    def evaluation_is_due(self) -> bool:
        """Whether there is evaluation data, and it is time to evaluate."""
        run = self._run
        if run.eval_dataset is None:
            return False
        return self.step == run.steps or _due(self.step, run.train_args.eval_steps)

    def checkpoint_is_due(self) -> bool:
        """Whether it is time to save a checkpoint."""
        every = self._run.train_args.save_steps
        if every is None:
            return time.monotonic() - self._saved_at >= SAVE_SECONDS
        return _due(self.step, every)

    def must_stop(self, signals: Signals) -> bool:
        """Whether a signal ends the run now. Several processes agree on it during a step."""
        return self._stop_agreed or (self._world == 1 and signals.received is not None)

    # -- the phases

    def mask_phase(self) -> None:
        """Chooses the masks. The sparse branch then trains, and is held inside the weights."""
        run, saving = self._run, self._run.train_args.save_steps != 0
        if self.step > 0 and saving:
            self.save()  # a process that is killed in the mask phase loses nothing
        self._log.say(f"step {self.step}: choosing the masks")
        began = self._enter("mask")
        set_masks(run.model, choose_masks(run, self._log.say))
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
        self._log.say(f"chose the masks in {time.perf_counter() - began:.1f} s")
        if saving:
            self.save(just_masked=True)

    def optimizer_step(self, signals: Signals) -> None:
        """One optimizer step. The seed and the step's number decide which rows it takes."""
        run, dataset, args = self._run, self._run.dataset, self._run.train_args
        began = self._enter("train" if self.masked or run.mask_step is None else "warmup")
        torch.manual_seed(seed_of(args.seed, self.step, self._rank))
        set_learning_rates(run, self.step)
        indices = run.order.batch(self.step)
        shares = dataset.share(indices, args.per_device_train_batch_size, self._rank, self._world)
        targets = max(sum(dataset.targets[i] for i in indices), 1)
        losses = backward(run, shares, targets)
        distributed.reduce_gradients(self._trained)
        loss = self._agree(losses, signals)
        check_loss(run, self.step, loss, shares, losses)
        norm = clip_gradients(run, self.step, self._trained, shares)
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
        """Measures and logs the loss on the evaluation data."""
        run, dataset = self._run, self._run.eval_dataset
        assert dataset is not None
        began = self._enter("eval")
        loss, targets, bad = evaluate_dataset(run.model, dataset, run.train_args, run.accelerator)
        check_evaluation(run, self.step, loss, bad)
        self._log.write(self.step, "eval", loss=loss, targets=targets, **self._cost(began))
        self._log.say(f"step {self.step}: evaluation loss {loss:.4f}")

    def save(self, just_masked: bool = False) -> Path | None:
        """Writes a checkpoint. Returns its folder; processes other than the first return None."""
        run = self._run
        if not run.accelerator.is_main_process:
            return None
        self._log.sync()
        self._saved_at = time.monotonic()
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
        """Saves a checkpoint, and returns the exception to raise."""
        where = self.save() or "a checkpoint"
        distributed.barrier()  # a launcher ends all processes as soon as one has ended
        return signals.interrupted(self.step, where)

    def save_final(self) -> None:
        """Writes the adapter, or the model of full fine-tuning, into the run's folder."""
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
        """Completes `generate_examples` evaluation examples, and logs the exact match."""
        run, count = self._run, self._run.train_args.generate_examples
        if run.eval_dataset is None or not count:
            return
        began = self._enter("generate")
        examples = run.eval_dataset.examples[:count]
        self._log.say(f"completing {len(examples)} evaluation examples")
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
        """Takes S out of the weights, after all processes have finished."""
        distributed.barrier()
        if self._resident is not None:
            self._resident.remove()

    # -- parts of the phases

    def _enter(self, phase: str) -> float:
        """Begins a phase, or continues it. Returns the time."""
        if phase != self._phase:
            self._memory.reset()
            self._phase = phase
        return time.perf_counter()

    def _cost(self, began: float) -> dict[str, float]:
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak_bytes": self._memory.bytes()}

    def _agree(self, losses: list[Tensor], signals: Signals) -> float:
        """The loss over all processes. The same reduction tells whether a process had a signal."""
        totals = torch.tensor([0.0, float(signals.received is not None)], device=self._device)
        for one in losses:
            totals[0] += one
        loss, stop = distributed.all_reduce(totals).tolist()
        self._stop_agreed = bool(stop)
        return float(loss)


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0
