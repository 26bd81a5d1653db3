"""Handles Ctrl-C and SIGTERM in a run: the step is finished and saved first."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after it was saved. The message says how to continue.

    Attributes:
        code: the exit status that a shell expects, 128 + the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Signals:
    """A context that only records SIGINT and SIGTERM, so that the step can finish and be saved.

    A second signal stops at once, but only if it comes more than 1 s later: Ctrl-C reaches a
    process under torchrun twice, from the terminal and from torchrun. Python takes handlers only
    in the main thread. In other threads the context does nothing.

    Attributes:
        received: the number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._previous:
            self._restore(number)

    def _restore(self, number: int) -> None:
        previous = self._previous[number]  # None: the handler was not set by Python
        signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"{name}: finishing the step and saving; repeat to stop at once", file=sys.stderr)
        elif time.monotonic() - self._at > 1:
            self._restore(number)
            signal.raise_signal(number)

    def interrupted(self, step: int, where: object) -> Interrupted:
        """The exception to raise after a run was saved at a step, in the folder `where`."""
        number = self.received or signal.SIGTERM  # None: another process got the signal
        return Interrupted(
            f"{signal.Signals(number).name} after step {step}: saved {where}. To go on, give the "
            "same command with --resume_from_checkpoint last",
            128 + number,
        )
