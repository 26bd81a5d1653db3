"""One run: suites on devices, within a time budget. Rows are written at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rosa_kernels.testing import Case

from ..measuring import environment, results, timing
from ..measuring.console import UsageError
from ..report import calibrate
from ..suites.cases import case_id
from . import runner, stages
from .plan import Entry, Part

# quick must end within four minutes, plots included, on two slow cores. Three samples suffice to
# tell a factor of two. Cases that its budget does not reach are recorded as not run.
# layer: its targets are a few percent, on ratios of calls of 50 ms.
# first, second: many cases within minutes. A sample of short calls takes 10 ms, most of it flushes.
_SHORT = timing.StoppingRule(cap_s=0.3, noise=0.02, min_samples=5, max_samples=40)
_RULES = {
    "first": _SHORT,
    "second": _SHORT,
    "quick": timing.StoppingRule(cap_s=0.25, noise=0.03, min_samples=3, max_samples=100),
    "layer": timing.StoppingRule(cap_s=1.5, noise=0.005, min_samples=7, max_samples=60),
}
_BUDGETS = {"quick": 200.0}


class Session:
    """One run over all its parts: its rows, and the state of its devices.

    Attributes:
        rows: the rows so far. They are in `out` as well.
        staged: the rows of the stages so far. They are in `stages_out` as well.
        lost: why a device accepts no more work, by device.
    """

    def __init__(self, args: argparse.Namespace, parts: Sequence[Part]) -> None:
        self._args, self._parts = args, parts
        self._identity = environment.run_record(args.argv)
        self._base: dict[str, results.Row] = {}
        self.out: Path = args.out / "results.jsonl"
        self.stages_out: Path = args.out / "stages.jsonl"
        self.rows: list[results.Row] = []
        self.staged: list[results.Row] = []
        self.lost: dict[str, str] = {}
        if args.resume:
            self._resume()
        results.append(self.out, [])  # fails now, not after minutes, if rows cannot be written
        self._resumed = self._done()

    def left(self) -> int:
        """The number of cases without rows."""
        planned = {(p.device, case_id(case)) for p in self._parts for case, _ in p.plan}
        return len(planned - self._done())

    def measure(self, part: Part, end: float, spent: str) -> None:
        """Measure a part's cases that begin before `end`; `spent` is the reason of the others.

        Raises:
            UsageError: the run is resumed on another machine, or with another number of threads.
        """
        device = part.device
        plan = [entry for entry in part.plan if (device, case_id(entry[0])) not in self._resumed]
        if not plan:
            return
        if device not in self._base:
            self._begin(device, part.suite)
        rule = _rule(self._args, part.suite)
        print(f"{part.suite} suite on {device}, {len(plan)} cases")
        width = len(str(len(plan)))
        for number, (case, competing) in enumerate(plan, start=1):
            if device in self.lost:
                reason = f"not run: {device} was lost ({self.lost[device]})"
                new = runner.skipped(case, competing, reason)
            elif time.monotonic() > end:
                new = runner.skipped(case, competing, f"not run: {spent}")
            else:
                new = runner.run_case(case, competing, rule, device, self._args.timer)
                self._check_device(device)
            self._write(device, new)
            # Not a progress bar: it would redraw ten times a second beside the timed calls.
            print(f"[{number:{width}}/{len(plan)}] {_line(case, new)}", flush=True)

    def stages(self, end: float) -> None:
        """Measure stage times of the cases of all parts that begin before `end`."""
        for device, base in self._base.items():
            if device not in self.lost:
                plan = self._plan(device)
                for row in stages.measure(device, plan, base, self.stages_out, end):
                    self.staged.append(row)
                self._check_device(device)

    def _plan(self, device: str) -> list[Entry]:
        return [entry for part in self._parts if part.device == device for entry in part.plan]

    def _begin(self, device: str, suite: str) -> None:
        """Warm a device up and measure its roofs."""
        base = self._base[device] = self._identity | environment.device_record(device)
        before = next((row for row in self.rows if row["device"] == device), base)
        self._must_agree(before, base, set(results.DEVICE_COLUMNS) - {"sm_clock_mhz"})
        threads = f", {base['threads']} threads" if device == "cpu" else ""
        print(f"{base['device_name']}{threads}, torch {base['torch']}")
        cases = self._plan(device)
        runner.warm_up({(c.op, c.name): c for _, cs in cases for c in cs}.values(), device)
        self._check_device(device)
        if device not in self.lost and before is base:
            dtypes = sorted({case.dtype for case, _ in cases}, key=str)
            rule = _rule(self._args, suite)
            try:
                self._write(device, runner.roof_rows(dtypes, rule, device))
            except Exception as error:  # the cases can still be measured
                print(f"Roofs of {device} were not measured: {type(error).__name__}: {error}")
            self._check_device(device)
        if device == "cuda" and self._args.calibrate and device not in self.lost:
            calibrate.adopt(self.rows, self._args.calibrate)

    def _resume(self) -> None:
        """Take over the last run in the file, and its identity.

        Raises:
            UsageError: there is no run, or it is of another version of this repository.
        """
        self.rows = results.latest_run(results.read(self.out))
        if not self.rows:
            raise UsageError(f"--resume: expected a run in {self.out}, got none")
        now, first = self._identity, self.rows[0]
        self._must_agree(first, now, {"git_sha"})
        self._identity = {column: first[column] for column in results.RUN_COLUMNS}

    @staticmethod
    def _must_agree(before: results.Row, now: results.Row, columns: set[str]) -> None:
        for column in sorted(columns):
            if now[column] != before[column]:
                raise UsageError(
                    f"--resume: expected {column} {before[column]} as in run {before['run_id']}, "
                    f"got {now[column]}"
                )

    def _done(self) -> set[tuple[str, str]]:
        """The device and name of every case with rows."""
        return {(row["device"], row["case"]) for row in self.rows}

    def _check_device(self, device: str) -> None:
        reason = runner.lost(device)
        if reason is not None:
            self.lost[device] = reason

    def _write(self, device: str, new: list[results.Row]) -> None:
        new = [row | self._base[device] for row in new]
        self.rows.extend(new)
        results.append(self.out, new)  # at once: an interrupted run loses nothing


def end_of_part(
    budget: float | None, start: float, suite: str, parts_left: int, reserved: float = 0.0
) -> tuple[float, str]:
    """The time after which a part begins no case, and the reason for the cases that it leaves out.

    The rest of the budget, less `reserved`, is shared evenly by this part and the parts to come.
    """
    now = time.monotonic()
    if budget is None:
        budget, share = _BUDGETS.get(suite, float("inf")), _BUDGETS.get(suite, float("inf"))
    else:
        share = max(start + budget - reserved - now, 0.0) / parts_left
    return now + share, f"the time budget of {budget:g} s was spent"


def _rule(args: argparse.Namespace, suite: str) -> timing.StoppingRule:
    rule = _RULES.get(suite, timing.StoppingRule())
    if args.cap is None:
        return rule
    return timing.StoppingRule(args.cap, rule.noise, rule.min_samples, rule.max_samples)


def _line(case: Case, rows: list[results.Row]) -> str:
    """A case's name and its times, fastest first; from token-major if there is such a row."""
    times: dict[str, tuple[float, str]] = {}
    for row in reversed(rows):
        name = row["kernel"] if row["mode"] == "no_grad" else f"{row['kernel']} {row['mode']}"
        text = row["status"] if row["median_s"] is None else f"{row['median_s'] * 1e3:.3g}"
        times.setdefault(name, (row["median_s"] or float("inf"), text))
    shown = [f"{name} {text}" for name, (_, text) in sorted(times.items(), key=lambda t: t[1][0])]
    return f"{case_id(case)} ms: {', '.join(shown)}"
