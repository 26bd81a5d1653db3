"""The commands. Each takes parsed arguments and returns an exit status."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from rosa_kernels.testing import Case
from rosa_train.cli.tables import Table

from ..contenders import cusparse_api
from ..contenders.base import Problem
from ..measuring import console, environment, results
from ..measuring.console import UsageError
from ..measuring.names import OPS
from ..report import calibrate, compare, experiments, ratios, tables
from ..report import layer as layer_tables
from ..report import stages as stage_tables
from ..run import stages
from ..run.plan import parts
from ..suites import SUITES
from ..suites.cases import case_id, contenders, suite
from .run import draw, summarise
from .run import run as run  # the parser takes it from here


def list_suites(args: argparse.Namespace) -> int:
    """List the suites, or the cases and contenders of one suite."""
    device = _this_device() if args.device == "auto" else args.device
    if args.suite is None:
        table = Table(f"Suites on {device}", ["suite", "cases", "pairs", "description"])
        for name, what in SUITES.items():
            cases = suite(name, device=device)
            pairs = sum(len(contenders(case, device)) for case in cases)
            table.rows.append([name, str(len(cases)), str(pairs), what])
        console.show(table)
        return 0
    table = Table(f"Suite {args.suite} on {device}", ["case", "contenders"])
    for case in suite(args.suite, device=device):
        labels = ", ".join(contender.label for contender in contenders(case, device))
        table.rows.append([case_id(case), labels])
    console.show(table)
    return 0


def measure_stages(args: argparse.Namespace) -> int:
    """Time each stage of our kernels and show it beside its prediction."""
    if args.device == "auto":
        args.device = _this_device()
    end = time.monotonic() + (args.time_budget or float("inf"))
    plan = [entry for part in parts(args) for entry in part.plan]
    if args.bare:
        stages.bare(args.device, plan, end)
        return 0
    base = environment.run_record(args.argv) | environment.device_record(args.device)
    rows: list[results.Row] = []
    status = 0
    try:
        for row in stages.measure(args.device, plan, base, args.out, end):
            rows.append(row)
    except KeyboardInterrupt:
        status = console.INTERRUPTED
    for table in stage_tables.tables(rows):
        console.show(table)
    print(f"\nWrote\n  {args.out}" if rows else "\nNo kernel was timed")
    if status:
        print("\nInterrupted. To go on, choose the other cases with --suite, --ops or --kernels")
    return status


def _this_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def draw_plots(args: argparse.Namespace) -> int:
    """Draw the plots of a run again."""
    written = draw(_select_run(args.results, args.run_id), args.out or args.results.parent)
    if not written:
        raise UsageError(f"{args.results}: expected timed rows to draw, got none")
    print("Wrote", *(f"  {path}" for path in written), sep="\n")
    return 0


def show_report(args: argparse.Namespace) -> int:
    """Show every case of a run, and its summary."""
    rows = _select_run(args.results, args.run_id)
    for table in tables.case_tables(rows):
        console.show(table)
    summarise(rows)
    return 0


def show_ratios(args: argparse.Namespace) -> int:
    """Show the ratios to every peer, and the targets."""
    rows = [row for path in args.results for row in _select_run(path, args.run_id)]
    found = [*ratios.tables(rows), *experiments.tables(rows), *layer_tables.tables(rows)]
    if not found:
        names = ", ".join(map(str, args.results))
        raise UsageError(f"{names}: expected timed rows to compare, got none")
    for table in found:
        console.show(table)
    return 0


def keep_calibration(args: argparse.Namespace) -> int:
    """Save the rates that a CUDA run measured as rates of the cost model."""
    path, measured = calibrate.calibrate(_select_run(args.results, args.run_id), args.out)
    for rate, value in measured.items():
        print(f"{rate:8} {value:.4g}")
    print(f"Wrote {path}")
    return 0


def compare_runs(args: argparse.Namespace) -> int:
    """Compare two runs row by row.

    Returns 1 if a row is slower and --fail-on-slower is given.
    """
    base, new = (results.latest_run(results.read(path)) for path in (args.base, args.new))
    found = compare.compare(base, new, args.threshold)
    if not found:
        raise UsageError("compare: expected runs with rows, got none")
    for table in compare.tables(found, show_same=args.all):
        console.show(table)
    return int(args.fail_on_slower and any(item.verdict == "slower" for item in found))


def show_environment(args: argparse.Namespace) -> int:
    """Show the machine, the versions, and which contenders can run here."""
    table = Table("Environment", ["what", "value"])
    device = _this_device()
    record = environment.run_record([]) | environment.device_record(device)
    for name in ("run_id", "argv", "schema_version"):
        del record[name]
    cusparse = cusparse_api.library() if torch.cuda.is_available() else "no CUDA device"
    record |= environment.extra_record()
    record["cuSPARSE"] = cusparse if isinstance(cusparse, str) else cusparse.version
    for name, value in record.items():
        table.rows.append([name, "-" if value is None else str(value)])
    console.show(table)
    for op in OPS:
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
