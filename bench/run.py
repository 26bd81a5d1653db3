"""The `run` command: suites on devices, within a time budget, rows written as they come."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import console, environment, measure, ratios, report, results, runner
from bench.cases import case_id, contenders, suite
from bench.contender import Contender
from bench.layer import tables as layer_tables
from bench.layer.contenders import LayerContender
from rosa_kernels.testing import Case

# quick has to stay under four minutes with its plots on two slow cores: three samples tell a factor
# of two, and what its budget does not reach is recorded as not run.
# layer: targets of a few percent are set on ratios of calls of 50 ms.
_RULES = {
    "quick": measure.Rule(cap_s=0.25, noise=0.03, min_samples=3, max_samples=100),
    "layer": measure.Rule(cap_s=1.5, noise=0.005, min_samples=7, max_samples=60),
}
_BUDGETS = {"quick": 200.0}


class UsageError(ValueError):
    """Arguments that parse but make no sense together."""


@dataclass(frozen=True)
class _Part:
    """One suite on one device."""

    device: str
    suite: str
    plan: list[tuple[Case, list[Contender | LayerContender]]]


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, draw the plots; 1 if a device was lost on the way."""
    parts = _parts(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    start = time.monotonic()
    session = _Session(args, parts)
    for number, part in enumerate(parts):
        session.measure(part, *_end(args.time_budget, start, part.suite, len(parts) - number))
    print(f"Measured in {time.monotonic() - start:.0f} s")
    summarise(session.rows, limit=10)
    written = [session.out]
    if not args.no_plots:
        try:
            written += draw(session.rows, args.out)
        except UsageError as error:  # the rows are there, which is what takes a machine
            print(f"\n{error}")
    for device, reason in session.lost.items():
        print(f"\n{device} was lost, and its remaining cases were not run: {reason}")
    print("\nWrote", *(f"  {path}" for path in written), sep="\n")
    return int(bool(session.lost))


class _Session:
    """One run over all its parts: its rows, and what it knows of its devices."""

    def __init__(self, args: argparse.Namespace, parts: Sequence[_Part]) -> None:
        self._args, self._parts = args, parts
        self._identity = environment.run_record(args.argv)
        self._base: dict[str, results.Row] = {}
        self.out: Path = args.out / "results.jsonl"
        self.rows: list[results.Row] = []
        self.lost: dict[str, str] = {}

    def measure(self, part: _Part, end: float, spent: str) -> None:
        """All cases of a part that begin before `end`; the others get `spent` as their reason."""
        device = part.device
        if device not in self._base:
            self._begin(device)
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
                    new = runner.run_case(case, competing, rule, device)
                    self._look_after(device)
                self._keep(device, new)
                advance(_line(case, new))

    def _begin(self, device: str) -> None:
        """Warm a device up, and measure what it can do at most."""
        base = self._base[device] = self._identity | environment.device_record(device)
        threads = f", {base['threads']} threads" if device == "cpu" else ""
        print(f"{base['device_name']}{threads}, torch {base['torch']}")
        parts = [part for part in self._parts if part.device == device]
        cases = [entry for part in parts for entry in part.plan]
        runner.warm_up({(c.op, c.name): c for _, cs in cases for c in cs}.values(), device)
        self._look_after(device)
        if device not in self.lost:
            dtypes = sorted({case.dtype for case, _ in cases}, key=str)
            rule = _rule(self._args, parts[0].suite)
            self._keep(device, runner.roof_rows(dtypes, rule, device))

    def _look_after(self, device: str) -> None:
        reason = runner.lost(device)
        if reason is not None:
            self.lost[device] = reason

    def _keep(self, device: str, new: list[results.Row]) -> None:
        new = [row | self._base[device] for row in new]
        self.rows.extend(new)
        results.append(self.out, new)  # at once: an interrupted run loses nothing


def _end(budget: float | None, start: float, suite: str, parts_left: int) -> tuple[float, str]:
    """When a part has to begin no further case, and what to say of those that it does not.

    What is left of a budget is shared evenly between this part and those to come.
    """
    now = time.monotonic()
    if budget is None:
        budget, share = _BUDGETS.get(suite, float("inf")), _BUDGETS.get(suite, float("inf"))
    else:
        share = max(start + budget - now, 0.0) / parts_left
    return now + share, f"the time budget of {budget:g} s was spent"


def _parts(args: argparse.Namespace) -> list[_Part]:
    """The parts that the arguments leave something of, in the order given."""
    parts = []
    known: dict[str, None] = {}
    for device in _devices(args.device):
        for name in args.suite:
            part = _Part(device, name, [])
            for case in suite(name, args.seed, device):
                competing = contenders(case, device)
                known |= dict.fromkeys(c.name for c in competing)
                competing = [c for c in competing if _wanted(c.name, args)]
                if competing and (not args.ops or case.op in args.ops):
                    part.plan.append((case, competing))
            if part.plan:
                parts.append(part)
    for option, names in (("--kernels", args.kernels), ("--without", args.without)):
        unknown = sorted(set(names or ()) - set(known))
        if unknown:
            raise UsageError(
                f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}"
            )
    if not parts:
        names = " or ".join(args.suite)
        raise UsageError(f"run: expected filters that leave a pair of {names}, got none left")
    return parts


def _wanted(name: str, args: argparse.Namespace) -> bool:
    return (not args.kernels or name in args.kernels) and name not in (args.without or ())


def _devices(asked: str) -> list[str]:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UsageError("--device: expected a machine with CUDA, got none")
    if asked == "auto":
        return ["cuda", "cpu"] if available else ["cpu"]
    return [asked]


def _rule(args: argparse.Namespace, suite: str) -> measure.Rule:
    rule = _RULES.get(suite, measure.Rule())
    if args.cap is None:
        return rule
    return measure.Rule(args.cap, rule.noise, rule.min_samples, rule.max_samples)


def _line(case: Case, rows: list[results.Row]) -> str:
    """A case's name, and its times, fastest first, from token-major where there is that row."""
    times: dict[str, tuple[float, str]] = {}
    for row in reversed(rows):
        name = row["kernel"] if row["mode"] == "no_grad" else f"{row['kernel']} {row['mode']}"
        text = row["status"] if row["median_s"] is None else f"{row['median_s'] * 1e3:.3g}"
        times.setdefault(name, (row["median_s"] or float("inf"), text))
    shown = [f"{name} {text}" for name, (_, text) in sorted(times.items(), key=lambda t: t[1][0])]
    return f"{case_id(case)} ms: {', '.join(shown)}"


def summarise(rows: list[results.Row], limit: int | None = None) -> None:
    """Print what a run says; of a GPU also what `ratios` says, which is set targets on."""
    gpu = [row for row in rows if row["device"] != "cpu"]
    found = report.summary(rows, limit) + layer_tables.tables(rows) + ratios.tables(gpu, limit)
    for table in found:
        console.show(table)
    note = report.noise_note(rows)
    if note is not None:
        print(f"\n{note}")


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
