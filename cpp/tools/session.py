"""Run commands within a time budget. Each command gets an outcome, and the session ends in time.

Every outcome is one of OUTCOMES. A command is "not reached" if it was never begun, or was stopped
because the session's time was up. This outcome does not say whether the command's results are
right.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

OUTCOMES = ("ok", "skipped", "not reached", "failed", "incorrect")
# Time reserved for stopping commands and writing the table of outcomes.
_RESERVE_S = 3.0
# With less time than this, a command is not begun, because it could do nothing useful.
_SHORTEST_S = 1.0
# How long to wait for a killed process. A driver may hold one forever; such a process is left
# behind.
_PATIENCE_S = 2.0
_LINES_SHOWN = 12


@dataclass(frozen=True)
class Task:
    """A command to run.

    Attributes:
        name: the command's name in the table of outcomes.
        command: the program and its arguments.
        limit_s: seconds after which the command is stopped. None: only the session's end stops it.
        ends_itself: whether the command ends well before its limit by itself. If it is stopped at
            its limit, it hangs and has "failed". Other commands are then "not reached".
        wrong: a regular expression. The outcome is "incorrect" if and only if a line of output
            matches, even if the command is stopped later.
        excuses: outcomes by regular expression. If the command fails, the first expression that
            matches a line decides the outcome.
        environment: variables that are added to the session's.
        show: how many of its last lines the terminal shows at the session's end. The log has all.
    """

    name: str
    command: Sequence[str | Path]
    limit_s: float | None = None
    ends_itself: bool = False
    wrong: str = ""
    excuses: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    show: int = 0


@dataclass(frozen=True)
class Step:
    """How one task ended."""

    name: str
    outcome: str
    seconds: float
    reason: str = ""
    lines: Sequence[str] = ()
    show: int = 0

    @property
    def ok(self) -> bool:
        """Whether the task ran to its end and found nothing wrong."""
        return self.outcome == "ok"


class Session:
    """Runs tasks until its time is up, and keeps their outcomes.

    Args:
        budget_s: the time for the whole session in seconds.
        log: the file to which every line is written.
        cwd: the working directory of the commands.
        environment: the environment of the commands.
    """

    def __init__(
        self, budget_s: float, log: IO[str], cwd: Path, environment: Mapping[str, str]
    ) -> None:
        self.steps: list[Step] = []
        self._log, self._cwd, self._environment = log, cwd, dict(environment)
        self._start = time.monotonic()
        self._end = self._start + budget_s - _RESERVE_S
        self._running: list[_Running] = []
        self._lock = threading.Lock()
        # Ends the session even if a command or this process hangs.
        self._watchdog = threading.Timer(budget_s, self._overrun)
        self._watchdog.daemon = True
        self._watchdog.start()

    def left(self) -> float:
        """Seconds until tasks are stopped."""
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        """Write a text to the terminal and the log."""
        print(text, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a text to the log only."""
        with self._lock:
            print(text, file=self._log, flush=True)

    def skip(self, name: str, reason: str, outcome: str = "skipped") -> Step:
        """Record a task that is not run."""
        return self._keep(Step(name, outcome, 0.0, reason))

    def run(self, task: Task) -> Step:
        """Run one task."""
        return self.together([task])[0]

    def together(self, tasks: Sequence[Task]) -> list[Step]:
        """Run tasks at the same time. A failure of one does not affect the others."""
        if self.left() < _SHORTEST_S:
            return [self.skip(task.name, "the time is up", "not reached") for task in tasks]
        for task in tasks:
            words = ("..." if "\n" in word else word for word in map(str, task.command))
            self.note(f"\n== {task.name}: {' '.join(words)}")
        begun = [
            _Running(task, self._cwd, self._environment | dict(task.environment), self.note)
            for task in tasks
        ]
        self._running = begun
        found = [self._keep(running.finish(self._end)) for running in begun]
        self._running = []
        return found

    def _keep(self, step: Step) -> Step:
        self.steps.append(step)
        self.say(_line(step))
        return step

    def finish(self) -> int:
        """Print all outcomes, then the last lines of tasks that have some to show.

        Returns:
            The exit status: 0 if all is well, 1 if anything is incorrect, 2 if anything failed, 3
            if something was not reached.
        """
        self._watchdog.cancel()
        seconds = time.monotonic() - self._start
        self.say(f"\n== Outcomes after {seconds:.0f} s")
        for step in self.steps:
            self.say(_line(step))
        for step in self.steps:
            if step.show:
                print(f"\n== {step.name}", *step.lines[-step.show :], sep="\n", flush=True)
        found = {step.outcome for step in self.steps}
        for status, outcome in ((1, "incorrect"), (2, "failed"), (3, "not reached")):
            if outcome in found:
                return status
        return 0

    def stop(self) -> None:
        """Stop all running tasks. No later task is begun."""
        self._end = time.monotonic()
        for running in self._running:
            running.kill(patience_s=0.0)

    def _overrun(self) -> None:
        done = {step.name for step in self.steps}
        for running in self._running:
            if running.task.name not in done:
                self.steps.append(
                    running.step("not reached", "it did not stop when it was told to")
                )
        self.stop()
        status = self.finish()
        sys.stdout.flush()
        os._exit(status)  # a thread that hangs would keep the interpreter alive


class _Running:
    """A running command, and the thread that reads its output."""

    def __init__(
        self, task: Task, cwd: Path, environment: Mapping[str, str], note: Callable[[str], None]
    ) -> None:
        self.task = task
        self._note = note
        self._begin = time.monotonic()
        self._lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._error = ""
        try:
            self._process = subprocess.Popen(
                list(map(str, task.command)),
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its children end with it
            )
        except OSError as error:
            self._error = str(error)
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.append(line.rstrip("\n"))
                self._note(f"[{self.task.name}] {self._lines[-1]}")

    def kill(self, patience_s: float = _PATIENCE_S) -> None:
        """End the command and its children, without waiting for any that a driver holds."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(patience_s)

    def finish(self, end: float) -> Step:
        """Wait for the command's end, its limit or the session's end."""
        if self._process is None:
            return self.step("failed", self._error)
        limit = self.task.limit_s
        own_end = end if limit is None else min(end, self._begin + limit)
        try:
            status: int | None = self._process.wait(max(own_end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            status = None
            self.kill()
        # A grandchild may hold the pipe open. The session does not wait for its output.
        self._reader.join(_PATIENCE_S)
        last = self._lines[-1] if self._lines else "nothing"
        if self._said(self.task.wrong):
            return self.step("incorrect", self._said(self.task.wrong))
        for pattern, outcome in self.task.excuses.items():
            if status != 0 and self._said(pattern):
                return self.step(outcome, self._said(pattern))
        if status is None and own_end == end:
            return self.step("not reached", f"stopped, the time is up; its last words: {last}")
        if status is None:
            outcome = "failed" if self.task.ends_itself else "not reached"
            return self.step(outcome, f"not finished within {limit:.0f} s; its last words: {last}")
        if status == 0:
            return self.step("ok")
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return self.step("failed", f"{how}; its last words: {last}")

    def _said(self, pattern: str) -> str:
        """The first line of output that matches, or ""."""
        if not pattern:
            return ""
        return next((line for line in self._lines if re.search(pattern, line)), "")

    def step(self, outcome: str, reason: str = "") -> Step:
        """The step with this outcome. If it is bad, the terminal shows the last lines at once."""
        if outcome in ("failed", "incorrect"):
            for line in self._lines[-_LINES_SHOWN:]:
                print(f"    {line}", flush=True)
        seconds = time.monotonic() - self._begin
        return Step(self.task.name, outcome, seconds, reason, tuple(self._lines), self.task.show)


def _line(step: Step) -> str:
    reason = f": {step.reason[:300]}" if step.reason else ""
    return f"{step.outcome:12}{step.seconds:6.0f} s  {step.name}{reason}"
