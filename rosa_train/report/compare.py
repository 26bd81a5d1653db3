"""Trains several methods at one budget, each in its own process, and writes a table and figures.

LoRA decides the budget, because its rank is an integer. LoRA gets the rank nearest to the budget
that was asked for. The other methods get exactly as many trainable parameters as LoRA then has.
Full fine-tuning trains all parameters. Seed, data and order are the same for all methods.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rosa_kernels.masks.targets import find_targets, target_shapes
from rosa_train.cli.parse import parse_run, process
from rosa_train.cli.tables import show
from rosa_train.config import Arguments, MethodArguments, ModelArguments, flat
from rosa_train.data.dataset import read_dataset
from rosa_train.files import json_lines, write_file, write_json
from rosa_train.methods.budget import allocate
from rosa_train.methods.method import Method, method_named
from rosa_train.methods.schedule import plan
from rosa_train.report.comparison import add_ratios, draw, markdown, row_of, table
from rosa_train.run import metrics
from rosa_train.run.checkpoint import checkpoints
from rosa_train.run.folder import FolderLock
from rosa_train.run.load import check_models
from rosa_train.run.setup import check_fit, order_and_steps
from rosa_train.run.signals import Interrupted, Signals

# Options that a comparison decides itself.
_DECIDED = ("density", "rank_pattern", "density_pattern")
_HIDDEN = ("method", "resume_from_checkpoint", *_DECIDED)
# Options that may differ between a finished run and a repetition of it.
_PLACES = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm")


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 1 if a method failed, otherwise 0."""

    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            default="lora,spa,rosa,full",
            metavar="NAME,NAME,...",
            help="The methods to compare.",
        )
        parser.description = (
            f"{parser.description} It takes the options of train. OUTPUT_DIR/compare gets the "
            "table and the figures, and OUTPUT_DIR/METHOD gets each run. If the command is "
            "repeated, it resumes an interrupted run, and tries failed runs again."
        )

    text = "Fine-tune a model with several methods at equal trainable parameters."
    arguments, extra = parse_run("compare", text, argv, extend, hidden=_HIDDEN)
    check_models(arguments[0])
    names = [name for name in extra.methods.replace(",", " ").split() if name]
    rows = compare(names, arguments)
    show(table(rows))
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['method']} {row['status']}: {row['reason']}")
    print(f"Wrote {Path(arguments[3].output_dir) / 'compare'}")
    return int(any(row["status"] != "ok" for row in rows))


def compare(methods: Sequence[str], arguments: Arguments) -> list[dict[str, Any]]:
    """Trains each method, and writes results.jsonl, results.md and figures. Returns the rows.

    If a method fails, its row has the reason, and the other methods continue. Complete runs of an
    earlier call are kept. An interrupted run resumes from its last checkpoint.

    Args:
        methods: names of `rosa_train.METHODS`.
        arguments: the arguments of a run. `method` is ignored. `budget`, or LoRA's `rank`, is for
            all methods. Everything is written into `output_dir`.

    Raises:
        ValueError: the input is bad for the comparison as a whole. Nothing is trained then.
        Interrupted: SIGINT or SIGTERM came. The present run has been saved and has ended.
    """
    model_args, _, method_args, train_args = arguments
    kinds = _checked(methods, method_args)
    budget = matched_budget(model_args, method_args)
    out = Path(train_args.output_dir)
    runs = {kind.name: _run_arguments(kind, budget, arguments) for kind in kinds}
    _check_runs(kinds, runs, budget, arguments)
    done = [name for name in runs if not train_args.overwrite_output_dir and _is_done(runs[name])]
    folder = out / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with FolderLock(folder) as lock:
        lock.take()
        for name, values in runs.items():
            if name in done:
                print(f"{name}: the run is complete already", file=sys.stderr)
                code = 0
            else:
                code = _train(values, folder, fresh=train_args.overwrite_output_dir)
            rows.append(row_of(values, budget, code, folder / f"{name}.log"))
            _write_rows(folder, rows)
        add_ratios(rows)
        _write_rows(folder, rows)
        figures = draw(rows, folder)
        write_file(folder / "results.md", markdown(rows, runs, budget, figures))
    return rows


def matched_budget(model_args: ModelArguments, method_args: MethodArguments) -> int:
    """The trainable parameters of LoRA at `budget` (or at `rank`), only from the model's config.

    Raises:
        ValueError: the targets match nothing, or LoRA cannot meet the budget.
    """
    shapes = _shapes(_meta_model(model_args), method_args)
    return allocate("lora", shapes, rank=method_args.rank, budget=method_args.budget).trainable


def _meta_model(model_args: ModelArguments) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    kind = {} if model_args.dtype == "auto" else {"dtype": getattr(torch, model_args.dtype)}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kind)


def _shapes(model: Any, args: MethodArguments) -> dict[str, tuple[int, int]]:
    saved = args.modules_to_save or []
    return target_shapes(find_targets(model, args.targets, args.excluded, saved))


def _check_runs(
    kinds: Sequence[Method],
    runs: Mapping[str, dict[str, Any]],
    budget: int,
    arguments: Arguments,
) -> None:
    """Raises `ValueError` for what would stop one of the runs at its start: hours may lie before.

    The data is read for it, because the number of steps may depend on it.
    """
    from transformers import AutoTokenizer

    model_args, data_args, method_args, train_args = arguments
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path
    )
    dataset = read_dataset(data_args, tokenizer, training=True)
    if data_args.eval_source:
        read_dataset(data_args, tokenizer, training=False)
    _, steps = order_and_steps(len(dataset), train_args, world=1)
    model = _meta_model(model_args)
    shapes = _shapes(model, method_args)
    for kind in kinds:
        trained, _ = plan(kind, runs[kind.name]["schedule"], steps)
        check_fit(model, trained, dataset, data_args, method_args, train_args)
        try:
            allocate(trained, shapes, budget=None if kind.full else budget)
        except ValueError as error:
            raise ValueError(
                f"{error}; {budget:,} is LoRA's count, so choose a larger --budget or --rank, or "
                f"leave {kind.name} out of --methods"
            ) from error


def _checked(methods: Sequence[str], args: MethodArguments) -> list[Method]:
    kinds = [method_named(name) for name in methods]
    if not kinds or len(set(methods)) < len(methods):
        raise ValueError(f"--methods: expected different names, got {','.join(methods) or 'none'}")
    for name in _DECIDED:
        if getattr(args, name):
            raise ValueError(f"--{name}: expected --budget or --rank in a comparison, got --{name}")
    return kinds


def _run_arguments(kind: Method, budget: int, arguments: Arguments) -> dict[str, Any]:
    """The args.json of one method's run."""
    out = Path(arguments[3].output_dir)
    own = {
        "method": kind.name,
        "rank": None,
        "budget": None if kind.full else str(budget),
        # Only a method with both branches has a choice of schedule.
        "schedule": arguments[2].schedule if kind.low_rank and kind.sparse else None,
        "output_dir": str(out / kind.name),
        "resume_from_checkpoint": "last",
        "overwrite_output_dir": False,
    }
    return flat(*arguments) | own


def _is_done(values: dict[str, Any]) -> bool:
    """Whether the run is complete.

    An incomplete run resumes from its checkpoint, or starts again if it has none.

    Raises:
        ValueError: the run is complete, but has other arguments.
    """
    out = Path(values["output_dir"])
    if not (out / "result.json").is_file():
        return False
    there = json.loads((out / "args.json").read_text(encoding="utf-8"))
    for name, value in values.items():
        if name not in _PLACES and there.get(name) != value:
            raise ValueError(
                f"compare: expected --{name} {there.get(name)} as in the run in {out}, got "
                f"{value}; choose another --output_dir, or --overwrite_output_dir"
            )
    return True


def _train(values: dict[str, Any], folder: Path, *, fresh: bool) -> int:
    """Runs `train` in a new process that writes into a log. Returns the exit status.

    A new process has a new allocator, so that memory of earlier methods does not raise the peak.
    """
    name, out = values["method"], Path(values["output_dir"])
    if fresh or not checkpoints(out):
        values = values | {"resume_from_checkpoint": None, "overwrite_output_dir": True}
    options = folder / f"{name}.json"
    write_json(options, values)
    command, environment = process(["train", str(options)])
    log = folder / f"{name}.log"
    print(f"{name}: training; its output goes to {log}", file=sys.stderr)
    began = time.perf_counter()
    with log.open("wb") as output, Signals() as signals:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that a signal reaches the process only once, from here
        )
        try:
            with _progress(name, values["max_steps"]) as advance:
                while child.poll() is None and signals.received is None:
                    advance(out / "metrics.jsonl")
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(timeout=0.2)
            if signals.received is not None:
                child.send_signal(signals.received)
                child.wait()
                raise Interrupted(
                    f"{signal.Signals(signals.received).name} in the run of {name}. To go on, give "
                    "the same command again",
                    128 + signals.received,
                )
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    said = "done" if child.returncode == 0 else f"failed, exit status {child.returncode}"
    print(f"{name}: {said} after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return child.returncode


class _progress:
    """A progress bar of a run's steps, from its metrics.jsonl. It is drawn only on a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=name, total=total if total > 0 else None, unit="step")

    def __enter__(self) -> _progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, path: Path) -> None:
        if self._bar is None or not path.is_file():
            return
        rows = [row for row in metrics.read(path) if row["phase"] in ("warmup", "train")]
        if rows and rows[-1]["step"] > self._bar.n:
            self._bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}", refresh=False)
            self._bar.update(rows[-1]["step"] - self._bar.n)


def _write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_file(folder / "results.jsonl", json_lines(rows))
