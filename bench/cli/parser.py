"""The arguments of every command.

Nothing here imports torch, which takes seconds. A command is imported when its arguments are right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..measuring.console import UsageError
from ..measuring.names import DEVICE_TIMERS, LAYER_OPS, OPS
from ..measuring.results import ResultsError
from ..suites import SUITES

_CHOICES = (*OPS, *LAYER_OPS)
_COMMANDS = "run | stages | list | plot | report | ratios | calibrate | ..."


def main(argv: list[str] | None = None) -> int:
    """Parse, dispatch, and turn bad input into a message without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        from . import commands
    except ModuleNotFoundError as error:
        if error.name != "numpy":  # a bug, not a missing extra
            raise
        print("bench: expected numpy, got none: pip install 'rosa-kernels[bench]'", file=sys.stderr)
        return 2
    command: Callable[[argparse.Namespace], int] = getattr(commands, args.command)
    try:
        return command(args)
    except (ResultsError, UsageError) as error:
        parser.error(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        not_folder = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "not a folder" if not_folder else error.strerror or str(error)
        parser.error(f"expected a path that can be used, got {error.filename} ({reason})")


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value: float = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    # The wheel installs this folder under another name, and adds a script.
    program = "python -m bench" if __package__.startswith("bench.") else "rosa-bench"
    parser = argparse.ArgumentParser(
        prog=program, description=f"Command line: {program} {_COMMANDS}"
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: str, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def add_choice(sub: argparse.ArgumentParser) -> None:
        """Add the options that choose cases, devices and contenders."""
        sub.add_argument(
            "--suite",
            nargs="+",
            choices=list(SUITES),
            default=["quick"],
            metavar="SUITE",
            help="the suites to run, shown by `list` (default: quick)",
        )
        sub.add_argument(
            "--device",
            choices=["auto", "cpu", "cuda"],
            default="auto",
            help="auto (default): CUDA if there is a CUDA device, else CPU; `run` measures both",
        )
        sub.add_argument(
            "--ops",
            nargs="+",
            choices=_CHOICES,
            metavar="OP",
            help=f"only these ops: {', '.join(_CHOICES)}",
        )
        sub.add_argument(
            "--kernels",
            nargs="+",
            metavar="NAME",
            help="only these kernels and peers; `list --suite SUITE` shows the names",
        )
        sub.add_argument(
            "--without", nargs="+", metavar="NAME", help="all kernels and peers except these"
        )
        sub.add_argument(
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="seed of masks and inputs (default: %(default)s)",
        )
        sub.add_argument(
            "--experiments",
            action="store_true",
            help="on CUDA: also measure our tile SDDMM kernels with non-default settings",
        )

    sub = add("run", "run", "measure suites, print their tables and draw their plots")
    add_choice(sub)
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="folder for rows and plots (default: %(default)s)",
    )
    sub.add_argument(
        "--threads", type=_positive(int), metavar="N", help="CPU threads (default: torch's number)"
    )
    sub.add_argument(
        "--timer",
        choices=DEVICE_TIMERS,
        default=DEVICE_TIMERS[0],
        help="on CUDA: cold flushes the L2 cache before every call; hot does not; graph flushes it "
        "and replays the call as a CUDA graph (default: %(default)s)",
    )
    sub.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="on CUDA: save the roofs measured at the start to FILE, and let `auto` use them in "
        "this run",
    )
    sub.add_argument(
        "--stages", action="store_true", help="at the end, also measure what `stages` measures"
    )
    sub.add_argument(
        "--cap",
        type=_positive(float),
        metavar="S",
        help="most seconds of samples per contender (default: depends on the suite)",
    )
    sub.add_argument(
        "--time-budget",
        type=_positive(float),
        metavar="S",
        help="seconds for the whole run, shared by suites and devices; no case begins after that "
        "(default: no limit; quick has 200 per device)",
    )
    sub.add_argument("--no-plots", action="store_true", help="draw no plots")
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run in DIR: measure only the cases without rows",
    )

    sub = add(
        "stages",
        "measure_stages",
        "time each stage of our kernels and show it beside its prediction",
    )
    add_choice(sub)
    sub.add_argument(
        "--time-budget",
        type=_positive(float),
        metavar="S",
        help="seconds for the whole command; no case begins after that (default: no limit)",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("build/bench/stages.jsonl"),
        metavar="FILE",
        help="file for the rows (default: %(default)s)",
    )
    sub.add_argument(
        "--bare", action="store_true", help="call every kernel once without timing, for ncu"
    )

    sub = add("list", "list_suites", "list the suites, or the cases and contenders of one suite")
    sub.add_argument("--suite", choices=list(SUITES), help="list this suite's cases")
    sub.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="the device whose cases are listed (default: %(default)s)",
    )

    for name, command, text in (
        (
            "calibrate",
            "keep_calibration",
            "save the rates that a CUDA run measured as rates of the cost model",
        ),
        ("plot", "draw_plots", "draw the plots of a run again"),
        ("report", "show_report", "show every case of a run, and its summary"),
    ):
        sub = add(name, command, text)
        sub.add_argument("results", type=Path, help="a results.jsonl file")
        sub.add_argument("--run-id", help="default: the last run in the file")
        if name == "plot":
            sub.add_argument("--out", type=Path, metavar="DIR", help="default: the results' folder")
        if name == "calibrate":
            sub.add_argument("--out", type=Path, metavar="FILE", help="default: the user's cache")

    sub = add("ratios", "show_ratios", "show ratios to every peer by kind of case, and the targets")
    sub.add_argument("results", type=Path, nargs="+", help="results.jsonl files, read together")
    sub.add_argument("--run-id", help="default: the last run in each file")

    sub = add("compare", "compare_runs", "compare the last runs of two files")
    sub.add_argument("base", type=Path, help="the results.jsonl file to compare with")
    sub.add_argument("new", type=Path, help="the results.jsonl file to judge")
    sub.add_argument(
        "--threshold",
        type=_positive(float),
        default=0.05,
        help="relative changes up to this count as the same (default: 0.05)",
    )
    sub.add_argument("--all", action="store_true", help="also show rows that are the same")
    sub.add_argument("--fail-on-slower", action="store_true", help="exit 1 if any row is slower")

    add(
        "env",
        "show_environment",
        "show the machine, the versions, and which contenders can run here",
    )
    return parser
