"""The `run` command: suites on devices, within a time budget, rows written as they come."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import rosa_kernels as rk
from bench.contenders import experiments, ours
from bench.contenders.base import Contender
from bench.layer.contenders import LayerContender
from bench.measuring import clocks, console, environment, results, timing
from bench.report import calibrate, ratios, tables
from bench.report import layer as layer_tables
from bench.run import runner, stages
from bench.suites.cases import case_id, contenders, suite
from rosa_kernels import registry
from rosa_kernels.testing import Case

# quick has to stay under four minutes with its plots on two slow cores: three samples tell a factor
# of two, and what its budget does not reach is recorded as not run.
# layer: targets of a few percent are set on ratios of calls of 50 ms.
# first, second: breadth within minutes; a sample of short calls takes 10 ms, most of it flushes.
_SHORT = timing.Rule(cap_s=0.3, noise=0.02, min_samples=5, max_samples=40)
_RULES = {
    "first": _SHORT,
    "second": _SHORT,
    "quick": timing.Rule(cap_s=0.25, noise=0.03, min_samples=3, max_samples=100),
    "layer": timing.Rule(cap_s=1.5, noise=0.005, min_samples=7, max_samples=60),
}
_BUDGETS = {"quick": 200.0}
# What --stages takes of a time budget.
_STAGES_SHARE = 0.2
# Of a short summary; beside it, the end of a log of 12,000 characters holds every other table.
_STAGE_LINES = 30
Entry = tuple[Case, list[Contender | LayerContender]]


class UsageError(ValueError):
    """Arguments that parse but make no sense together."""


@dataclass(frozen=True)
class Part:
    """One suite on one device."""

    device: str
    suite: str
    plan: list[Entry]


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, draw the plots; 1 if a device was lost on the way."""
    found = parts(args)
    unwanted = {k.name for k in rk.kernels() if ours.row_name(k.name) in (args.without or ())}
    with registry.withheld(unwanted):  # "auto" would take them under its own name
        return _run(args, found)


def _run(args: argparse.Namespace, found: Sequence[Part]) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _say_what_is_for_cuda_alone(args, {part.device for part in found})
    start = time.monotonic()
    session = _Session(args, found)
    reserved = _STAGES_SHARE * (args.time_budget or 0.0) if args.stages else 0.0
    for number, part in enumerate(found):
        left = len(found) - number
        session.measure(part, *_end(args.time_budget, start, part.suite, left, reserved))
    print(f"Measured in {time.monotonic() - start:.0f} s")
    short = set(args.suite) <= {"first", "second"}
    staged: list[results.Row] = []
    if args.stages:
        if short:  # the profiler may hang where it is not supported
            _show_short(session.rows)
            sys.stdout.flush()
        staged = session.stages(start + (args.time_budget or float("inf")))
    summarise(session.rows, limit=10, short=short)
    for table in stages.tables(staged, _STAGE_LINES if short else None):
        console.show(table)
    written = [session.out, *([session.stages_out] if staged else [])]
    if not args.no_plots:
        try:
            written += draw(session.rows, args.out)
        except UsageError as error:  # the rows are there, which is what takes a machine
            print(f"\n{error}")
    for device, reason in session.lost.items():
        print(f"\n{device} was lost, and its remaining cases were not run: {reason}")
    print("\nWrote", *(f"  {path}" for path in written), sep="\n")
    if short:  # last, as where output is cut the end is kept
        _show_short(session.rows)
    return int(bool(session.lost))


class _Session:
    """One run over all its parts: its rows, and what it knows of its devices."""

    def __init__(self, args: argparse.Namespace, parts: Sequence[Part]) -> None:
        self._args, self._parts = args, parts
        self._identity = environment.run_record(args.argv)
        self._base: dict[str, results.Row] = {}
        self.out: Path = args.out / "results.jsonl"
        self.stages_out: Path = args.out / "stages.jsonl"
        self.rows: list[results.Row] = []
        self.lost: dict[str, str] = {}

    def measure(self, part: Part, end: float, spent: str) -> None:
        """All cases of a part that begin before `end`; the others get `spent` as their reason."""
        device = part.device
        if device not in self._base:
            self._begin(device, part.suite)
        rule = _rule(self._args, part.suite)
        print(f"{part.suite} suite on {device}, {len(part.plan)} cases")
        with console.progress(len(part.plan)) as advance:
            for case, competing in part.plan:
                if device in self.lost:
                    reason = f"not run: {device} was lost ({self.lost[device]})"
                    new = runner.skipped(case, competing, reason)
                elif time.monotonic() > end:
                    new = runner.skipped(case, competing, f"not run: {spent}")
                else:
                    new = runner.run_case(case, competing, rule, device, self._args.timer)
                    self._look_after(device)
                self._keep(device, new)
                advance(_line(case, new))

    def stages(self, end: float) -> list[results.Row]:
        """Stage times of the cases of all parts that begin before `end`."""
        rows: list[results.Row] = []
        for device, base in self._base.items():
            if device not in self.lost:
                rows += stages.measure(device, self._plan(device), base, self.stages_out, end)
                self._look_after(device)
        return rows

    def _plan(self, device: str) -> list[Entry]:
        return [entry for part in self._parts if part.device == device for entry in part.plan]

    def _begin(self, device: str, suite: str) -> None:
        """Warm a device up, and measure what it can do at most."""
        base = self._base[device] = self._identity | environment.device_record(device)
        threads = f", {base['threads']} threads" if device == "cpu" else ""
        print(f"{base['device_name']}{threads}, torch {base['torch']}")
        cases = self._plan(device)
        runner.warm_up({(c.op, c.name): c for _, cs in cases for c in cs}.values(), device)
        self._look_after(device)
        if device not in self.lost:
            dtypes = sorted({case.dtype for case, _ in cases}, key=str)
            rule = _rule(self._args, suite)
            try:
                self._keep(device, runner.roof_rows(dtypes, rule, device))
            except Exception as error:  # costs the roofs, not the cases
                print(f"Roofs of {device} were not measured: {type(error).__name__}: {error}")
            self._look_after(device)
        if device == "cuda" and self._args.calibrate and device not in self.lost:
            calibrate.adopt(self.rows, self._args.calibrate)

    def _look_after(self, device: str) -> None:
        reason = runner.lost(device)
        if reason is not None:
            self.lost[device] = reason

    def _keep(self, device: str, new: list[results.Row]) -> None:
        new = [row | self._base[device] for row in new]
        self.rows.extend(new)
        results.append(self.out, new)  # at once: an interrupted run loses nothing


def _say_what_is_for_cuda_alone(args: argparse.Namespace, devices: set[str]) -> None:
    """Options without a meaning on a CPU are ignored there, so that a run can be rehearsed."""
    if "cuda" in devices:
        return
    for option, given in (
        ("--timer", args.timer != clocks.COLD),
        ("--experiments", args.experiments),
        ("--calibrate", args.calibrate),
    ):
        if given:
            print(f"{option} is for CUDA and ignored on a CPU")


def _end(
    budget: float | None, start: float, suite: str, parts_left: int, reserved: float = 0.0
) -> tuple[float, str]:
    """When a part has to begin no further case, and what to say of those that it does not.

    What is left of a budget, less what is reserved, is shared evenly between this part and those to
    come.
    """
    now = time.monotonic()
    if budget is None:
        budget, share = _BUDGETS.get(suite, float("inf")), _BUDGETS.get(suite, float("inf"))
    else:
        share = max(start + budget - reserved - now, 0.0) / parts_left
    return now + share, f"the time budget of {budget:g} s was spent"


def parts(args: argparse.Namespace) -> list[Part]:
    """The parts that the arguments leave something of, in the order given.

    Raises:
        UsageError: a device that is not here, a name that no contender has, or nothing left.
    """
    found = []
    known: dict[str, None] = {}
    for device in _devices(args.device):
        for name in args.suite:
            part = Part(device, name, [])
            for case in suite(name, args.seed, device):
                competing = contenders(case, device)
                known |= dict.fromkeys(c.name for c in competing)
                if args.experiments:
                    competing = [*competing, *experiments.contenders(case, device)]
                competing = [c for c in competing if _wanted(c.name, args)]
                if competing and (not args.ops or case.op in args.ops):
                    part.plan.append((case, competing))
            if part.plan:
                found.append(part)
    for option, names in (("--kernels", args.kernels), ("--without", args.without)):
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise UsageError(
                f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}"
            )
    if not found:
        names = " or ".join(args.suite)
        raise UsageError(f"run: expected filters that leave a pair of {names}, got none left")
    return found


def _wanted(name: str, args: argparse.Namespace) -> bool:
    name = experiments.kernel_of(name)
    return (not args.kernels or name in args.kernels) and name not in (args.without or ())


def _devices(asked: str) -> list[str]:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UsageError("--device: expected a machine with CUDA, got none")
    if asked == "auto":
        return ["cuda", "cpu"] if available else ["cpu"]
    return [asked]


def _rule(args: argparse.Namespace, suite: str) -> timing.Rule:
    rule = _RULES.get(suite, timing.Rule())
    if args.cap is None:
        return rule
    return timing.Rule(args.cap, rule.noise, rule.min_samples, rule.max_samples)


def _line(case: Case, rows: list[results.Row]) -> str:
    """A case's name, and its times, fastest first, from token-major where there is that row."""
    times: dict[str, tuple[float, str]] = {}
    for row in reversed(rows):
        name = row["kernel"] if row["mode"] == "no_grad" else f"{row['kernel']} {row['mode']}"
        text = row["status"] if row["median_s"] is None else f"{row['median_s'] * 1e3:.3g}"
        times.setdefault(name, (row["median_s"] or float("inf"), text))
    shown = [f"{name} {text}" for name, (_, text) in sorted(times.items(), key=lambda t: t[1][0])]
    return f"{case_id(case)} ms: {', '.join(shown)}"


def summarise(rows: list[results.Row], limit: int | None = None, short: bool = False) -> None:
    """Print what a run says; of a GPU also what `ratios` says, which is set targets on.

    `short` leaves out what the ratios by mask, printed last, say again.
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
    for device, own in tables.by_device(rows).items():
        table = ratios.short_table(own)
        if table.rows:
            console.show(replace(table, title=f"{device}: {table.title}"))


def draw(rows: list[results.Row], out: Path) -> list[Path]:
    """Draw all plots.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from bench import plot
    except ImportError as error:
        raise UsageError(f"plots: expected matplotlib to be installed, got {error}") from error
    return plot.draw_all(rows, out)
