"""The arguments of every command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..contenders.ours import ops
from ..layer.case import OPS as LAYER_OPS
from ..measuring import clocks, results
from ..run.plan import UsageError
from ..suites import SUITES
from .commands import (
    compare_runs,
    draw_plots,
    keep_calibration,
    list_suites,
    measure_stages,
    show_environment,
    show_ratios,
    show_report,
)
from .run import run

_CHOICES = (*ops(), *LAYER_OPS)
_COMMANDS = "run | stages | list | plot | report | ratios | calibrate | ..."


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


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value: float = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    # The wheel installs this folder under another name, and a script.
    program = "python -m bench" if __package__.startswith("bench.") else "rosa-bench"
    parser = argparse.ArgumentParser(
        prog=program, description=f"Command line: {program} {_COMMANDS}"
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
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

    sub = add("stages", measure_stages, "our kernels stage by stage, measured beside predicted")
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

    sub = add("list", list_suites, "the suites, or the cases and contenders of one")
    sub.add_argument("--suite", choices=list(SUITES))
    sub.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")

    for name, command, text in (
        (
            "calibrate",
            keep_calibration,
            "give the cost model the rates that a run on CUDA measured",
        ),
        ("plot", draw_plots, "draw the plots of a run again"),
        ("report", show_report, "every case of a run, and its summary"),
    ):
        sub = add(name, command, text)
        sub.add_argument("results", type=Path, help="a results.jsonl")
        sub.add_argument("--run-id", help="default: the last run in the file")
        if command is draw_plots:
            sub.add_argument("--out", type=Path, metavar="DIR", help="default: beside the results")
        if command is keep_calibration:
            sub.add_argument("--out", type=Path, metavar="FILE", help="default: the user's cache")

    sub = add("ratios", show_ratios, "ratios to every peer by kind of case, and the targets")
    sub.add_argument("results", type=Path, nargs="+", help="results.jsonl files, taken together")
    sub.add_argument("--run-id", help="default: the last run in each file")

    sub = add("compare", compare_runs, "the last run of one file against the last of another")
    sub.add_argument("base", type=Path)
    sub.add_argument("new", type=Path)
    sub.add_argument("--threshold", type=_positive(float), default=0.05, help="default: 0.05")
    sub.add_argument("--all", action="store_true", help="also show what is the same")
    sub.add_argument("--fail-on-slower", action="store_true", help="exit 1 if anything is slower")

    add(
        "env",
        show_environment,
        "the machine, the versions, and which contenders can run here",
    )
    return parser
