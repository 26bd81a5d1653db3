"""Command line: python -m bench run | stages | list | plot | report | ratios | calibrate | ..."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.contenders import experiments
from bench.contenders.base import Problem
from bench.contenders.ours import ops
from bench.layer.case import OPS as LAYER_OPS
from bench.measuring import clocks, console, environment, results
from bench.report import calibrate, compare, ratios, tables
from bench.report import layer as layer_tables
from bench.report.tables import Table
from bench.run import stages
from bench.run.session import UsageError, draw, parts, run, summarise
from bench.suites.cases import SUITES, case_id, contenders, suite
from rosa_kernels.testing import Case

_OPS = ops()
_CHOICES = (*_OPS, *LAYER_OPS)


def main(argv: list[str] | None = None) -> int:
    """Parse, dispatch, and turn bad input into a message without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        return args.command(args)
    except (results.ResultsError, UsageError) as error:
        parser.error(str(error))


def _list(args: argparse.Namespace) -> int:
    device = _this_device() if args.device == "auto" else args.device
    if args.suite is None:
        table = Table(f"Suites on {device}", ["suite", "cases", "pairs", "what"])
        for name, described in SUITES.items():
            cases = suite(name, device=device)
            pairs = sum(len(contenders(case, device)) for case in cases)
            table.rows.append([name, str(len(cases)), str(pairs), described.what])
        console.show(table)
        return 0
    table = Table(f"Suite {args.suite} on {device}", ["case", "contenders"])
    for case in suite(args.suite, device=device):
        labels = ", ".join(contender.label for contender in contenders(case, device))
        table.rows.append([case_id(case), labels])
    console.show(table)
    return 0


def _stages(args: argparse.Namespace) -> int:
    if args.device == "auto":
        args.device = _this_device()
    end = time.monotonic() + (args.time_budget or float("inf"))
    plan = [entry for part in parts(args) for entry in part.plan]
    if args.bare:
        stages.bare(args.device, plan, end)
        return 0
    base = environment.run_record(args.argv) | environment.device_record(args.device)
    rows = stages.measure(args.device, plan, base, args.out, end)
    for table in stages.tables(rows):
        console.show(table)
    print(f"\nWrote\n  {args.out}" if rows else "\nno kernel was timed")
    return 0


def _this_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plot(args: argparse.Namespace) -> int:
    written = draw(_select_run(args.results, args.run_id), args.out or args.results.parent)
    if not written:
        raise UsageError(f"{args.results}: expected timed rows to draw, got none")
    print("Wrote", *(f"  {path}" for path in written), sep="\n")
    return 0


def _report(args: argparse.Namespace) -> int:
    rows = _select_run(args.results, args.run_id)
    for table in tables.case_tables(rows):
        console.show(table)
    summarise(rows)
    return 0


def _ratios(args: argparse.Namespace) -> int:
    rows = [row for path in args.results for row in _select_run(path, args.run_id)]
    found = [*ratios.tables(rows), *experiments.tables(rows), *layer_tables.tables(rows)]
    if not found:
        names = ", ".join(map(str, args.results))
        raise UsageError(f"{names}: expected timed rows to compare, got none")
    for table in found:
        console.show(table)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    path, measured = calibrate.calibrate(_select_run(args.results, args.run_id), args.out)
    for rate, value in measured.items():
        print(f"{rate:8} {value:.4g}")
    print(f"Wrote {path}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    base, new = (results.latest_run(results.read(path)) for path in (args.base, args.new))
    found = compare.compare(base, new, args.threshold)
    if not found:
        raise UsageError("compare: expected runs with rows, got none")
    for table in compare.tables(found, show_same=args.all):
        console.show(table)
    return int(args.fail_on_slower and any(item.verdict == "slower" for item in found))


def _env(args: argparse.Namespace) -> int:
    table = Table("Environment", ["what", "value"])
    device = _this_device()
    record = environment.run_record([]) | environment.device_record(device)
    for name in ("run_id", "argv", "schema_version"):
        del record[name]
    for name, value in {**record, **environment.extra_record()}.items():
        table.rows.append([name, "-" if value is None else str(value)])
    console.show(table)
    for op in _OPS:
        table = Table(f"Contenders of {op} on {device}", ["kernel", "state"])
        case = Case(op, 64, 64, 16, 0.1)
        problem = Problem.of(case, device)
        for contender in contenders(case, device):
            table.rows.append([contender.name, contender.reject(problem) or "ready"])
        console.show(table)
    return 0


def _select_run(path: Path, run_id: str | None) -> list[results.Row]:
    rows = results.read(path)
    if run_id is None:
        return results.latest_run(rows)
    known = list(dict.fromkeys(row["run_id"] for row in rows))
    if run_id not in known:
        raise UsageError(f"--run-id: expected one of {', '.join(known)}, got {run_id}")
    return [row for row in rows if row["run_id"] == run_id]


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value: float = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def add_choice(sub: argparse.ArgumentParser) -> None:
        """Which cases, on which devices, with which contenders."""
        sub.add_argument(
            "--suite", nargs="+", choices=list(SUITES), default=["quick"], metavar="SUITE"
        )
        sub.add_argument(
            "--device",
            choices=["auto", "cpu", "cuda"],
            default="auto",
            help="auto: CUDA, where there is a device; `run` measures the CPU too",
        )
        sub.add_argument(
            "--ops", nargs="+", choices=_CHOICES, metavar="OP", help=", ".join(_CHOICES)
        )
        sub.add_argument("--kernels", nargs="+", metavar="NAME", help="only these, see `list`")
        sub.add_argument("--without", nargs="+", metavar="NAME", help="all but these")
        sub.add_argument("--seed", type=int, default=0, metavar="N")
        sub.add_argument(
            "--experiments",
            action="store_true",
            help="on CUDA, our SDDMM kernels of tiles under other settings too",
        )

    sub = add("run", run, "measure suites, print their tables, draw their plots")
    add_choice(sub)
    sub.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="DIR", help="default: %(default)s"
    )
    sub.add_argument("--threads", type=_positive(int), metavar="N", help="default: torch's")
    sub.add_argument(
        "--timer",
        choices=clocks.DEVICE_TIMERS,
        default=clocks.COLD,
        help="on CUDA: caches flushed before every call, left as they are, or flushed and the call "
        "replayed as a graph (default: %(default)s)",
    )
    sub.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="on CUDA: have `auto` use the roofs measured at the start, and keep them there",
    )
    sub.add_argument(
        "--stages", action="store_true", help="at the end, also what `stages` measures"
    )
    sub.add_argument(
        "--cap", type=_positive(float), metavar="S", help="seconds of samples per contender"
    )
    sub.add_argument(
        "--time-budget",
        type=_positive(float),
        metavar="S",
        help="seconds for all of it, shared by suites and devices; no case is begun after "
        "(quick: 200 a device)",
    )
    sub.add_argument("--no-plots", action="store_true")

    sub = add("stages", _stages, "our kernels stage by stage, measured beside predicted")
    add_choice(sub)
    sub.add_argument(
        "--time-budget", type=_positive(float), metavar="S", help="seconds; no case is begun after"
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("build/bench/stages.jsonl"),
        metavar="FILE",
        help="default: %(default)s",
    )
    sub.add_argument(
        "--bare", action="store_true", help="call every kernel once and time nothing, for ncu"
    )

    sub = add("list", _list, "the suites, or the cases and contenders of one")
    sub.add_argument("--suite", choices=list(SUITES))
    sub.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")

    for name, command, text in (
        ("calibrate", _calibrate, "give the cost model the rates that a run on CUDA measured"),
        ("plot", _plot, "draw the plots of a run again"),
        ("report", _report, "every case of a run, and its summary"),
    ):
        sub = add(name, command, text)
        sub.add_argument("results", type=Path, help="a results.jsonl")
        sub.add_argument("--run-id", help="default: the last run in the file")
        if command is _plot:
            sub.add_argument("--out", type=Path, metavar="DIR", help="default: beside the results")
        if command is _calibrate:
            sub.add_argument("--out", type=Path, metavar="FILE", help="default: the user's cache")

    sub = add("ratios", _ratios, "ratios to every peer by kind of case, and the targets")
    sub.add_argument("results", type=Path, nargs="+", help="results.jsonl files, taken together")
    sub.add_argument("--run-id", help="default: the last run in each file")

    sub = add("compare", _compare, "the last run of one file against the last of another")
    sub.add_argument("base", type=Path)
    sub.add_argument("new", type=Path)
    sub.add_argument("--threshold", type=_positive(float), default=0.05, help="default: 0.05")
    sub.add_argument("--all", action="store_true", help="also show what is the same")
    sub.add_argument("--fail-on-slower", action="store_true", help="exit 1 if anything is slower")

    add("env", _env, "the machine, the versions, and which contenders can run here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
