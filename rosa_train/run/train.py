"""The trainer: one loop, from a model and a file of examples to an adapter."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rosa_train.config import DataArguments, MethodArguments, ModelArguments, TrainArguments
from rosa_train.run.banner import banner
from rosa_train.run.folder import FolderLock
from rosa_train.run.result import Result, read_result, say_complete, write_result
from rosa_train.run.setup import open_metrics, prepare
from rosa_train.run.signals import Interrupted, Signals
from rosa_train.run.trainer import Trainer

__all__ = ["Interrupted", "Result", "train"]


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    train_args: TrainArguments,
) -> Result:
    """Fine-tunes a causal LM on examples, and writes an adapter or a model into `output_dir`.

    An optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps * processes`
    rows. It minimises the mean cross entropy over all their target tokens, like one large batch.

    The weights and AdamW's moments are the only state. All else is a function of seed and step. So
    a run that is resumed from any checkpoint has, on a CPU, the bits of an uninterrupted run. A
    run that is resumed and is complete already is not trained again: its result is returned.

    Raises:
        ValueError: arguments, data or a checkpoint do not fit, or another run writes into
            `output_dir`. Nothing is trained then.
        FloatingPointError: a training or evaluation loss, or a gradient, is not finite. The message
            names the step, the records and the last checkpoint.
        Interrupted: SIGINT or SIGTERM came. The step was finished and saved first.
        OSError: a checkpoint could not be written. The earlier ones are intact.

    Source: RoSA, arXiv 2401.04679, Algorithm 1 and section 4.
    """
    started = time.perf_counter()
    with FolderLock(Path(train_args.output_dir)) as lock:
        run = prepare(model_args, data_args, method_args, train_args, lock)
        if run.complete:
            say_complete(run)
            return read_result(run.out)
        with closing(open_metrics(run)) as log:
            log.say(banner(run))
            trainer = Trainer(run, log)
            load_seconds = time.perf_counter() - started
            with Signals() as signals:
                while trainer.step < run.steps:
                    if trainer.masks_are_due():
                        trainer.mask_phase()
                    trainer.optimizer_step(signals)
                    if trainer.evaluation_is_due():
                        trainer.evaluate()
                    if trainer.checkpoint_is_due():
                        trainer.save()
                    if trainer.must_stop(signals):
                        raise trainer.interrupted(signals)
            trainer.save_final()
            trainer.generate()
        trainer.leave_weights()
        return write_result(run, load_seconds)
