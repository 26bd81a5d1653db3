"""The `run` command: a session, then its tables and plots."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import rosa_kernels as rk
from rosa_kernels import registry

from ..contenders import ours
from ..measuring import clocks, console, results
from ..measuring.console import UsageError
from ..report import experiments, ratios, tables
from ..report import layer as layer_tables
from ..report import stages as stage_tables
from ..report.rows import by_device
from ..run.plan import Part, parts
from ..run.session import Session, end_of_part

# The share of the time budget that --stages takes.
_STAGES_SHARE = 0.2
# Lines of stages in a short summary. With 30 lines, the last 12,000 characters of a log hold every
# table.
_STAGE_LINES = 30


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and draw the plots; after Ctrl-C, of what was measured.

    Returns 1 if a device was lost, and 130 after Ctrl-C.
    """
    found = parts(args)
    unwanted = {k.name for k in rk.kernels() if ours.row_name(k.name) in (args.without or ())}
    with registry.withheld(unwanted):  # or "auto" could still take them
        return _run(args, found)


def _run(args: argparse.Namespace, found: Sequence[Part]) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _say_what_is_for_cuda_alone(args, {part.device for part in found})
    start = time.monotonic()
    session = Session(args, found)
    reserved = _STAGES_SHARE * (args.time_budget or 0.0) if args.stages else 0.0
    short = set(args.suite) <= {"first", "second"}
    interrupted = False
    try:
        for number, part in enumerate(found):
            left = len(found) - number
            session.measure(part, *end_of_part(args.time_budget, start, part.suite, left, reserved))
        print(f"Measured in {time.monotonic() - start:.0f} s")
        if args.stages:
            if short:  # first, as the profiler hangs on some machines
                _show_short(session.rows)
                sys.stdout.flush()
            session.stages(start + (args.time_budget or float("inf")))
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted: what follows is of the cases so far", flush=True)
    summarise(session.rows, limit=10, short=short)
    for table in stage_tables.tables(session.staged, _STAGE_LINES if short else None):
        console.show(table)
    written = [session.out, *([session.stages_out] if session.staged else [])]
    if not args.no_plots:
        try:
            written += draw(session.rows, args.out)
        except UsageError as error:  # the rows are written; plots can be drawn later
            print(f"\n{error}")
    for device, reason in session.lost.items():
        print(f"\n{device} was lost, and its remaining cases were not run: {reason}")
    print("\nWrote", *(f"  {path}" for path in written), sep="\n")
    if short:  # last, because a log that is cut keeps its end
        _show_short(session.rows)
    if interrupted:
        how = (
            "the same command with --resume measures them"
            if session.rows
            else "nothing was measured"
        )
        print(f"\nInterrupted: {session.left()} cases have no rows yet; {how}")
        return console.INTERRUPTED
    return int(bool(session.lost))


def _say_what_is_for_cuda_alone(args: argparse.Namespace, devices: set[str]) -> None:
    """Say which options are ignored because no part runs on CUDA.

    They are not errors, so that the command of a GPU run can be rehearsed on a CPU.
    """
    if "cuda" in devices:
        return
    for option, given in (
        ("--timer", args.timer != clocks.COLD),
        ("--experiments", args.experiments),
        ("--calibrate", args.calibrate),
    ):
        if given:
            print(f"{option} applies to CUDA only and is ignored on a CPU")


def summarise(rows: list[results.Row], limit: int | None = None, short: bool = False) -> None:
    """Print the summary of a run; for a GPU also what `ratios` prints, which includes the targets.

    `short` leaves out what the table of ratios by mask, printed last, repeats.
    """
    if short:
        found = [tables.roof_table(rows), tables.status_table(rows)]
    else:
        gpu = [row for row in rows if row["device"] != "cpu"]
        found = tables.summary(rows, limit) + layer_tables.tables(rows) + ratios.tables(gpu, limit)
    found += experiments.tables(rows)
    for table in filter(lambda table: table.rows, found):
        console.show(table)
    note = tables.noise_note(rows)
    if note is not None:
        print(f"\n{note}")


def _show_short(rows: list[results.Row]) -> None:
    print("", *ratios.untimed(rows), sep="\n")
    for device, own in by_device(rows).items():
        table = ratios.short_table(own)
        if table.rows:
            console.show(replace(table, title=f"{device}: {table.title}"))


def draw(rows: list[results.Row], out: Path) -> list[Path]:
    """Draw all plots.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from .. import plot
    except ImportError as error:
        raise UsageError(
            "plots: expected matplotlib to be installed (pip install 'rosa-kernels[bench]'), "
            f"got {error}"
        ) from error
    return plot.draw_all(rows, out)
