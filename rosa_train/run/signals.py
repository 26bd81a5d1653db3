"""Ctrl-C and SIGTERM in a run: the step is finished and saved first."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run that a signal stopped after it saved; the message says how to go on.

    `code`: the exit status that a shell expects, 128 + the signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Signals:
    """Inside, SIGINT and SIGTERM only leave a note, so that the step can be finished and saved.

    A second signal stops at once, but only if it comes more than 1 s later: Ctrl-C reaches a
    process under torchrun twice, from the terminal and from torchrun. Outside the main thread
    Python takes no handlers; nothing is changed there.
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
        previous = self._previous[number]  # None: a handler that is not Python's
        signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"{name}: finishing the step and saving; again to stop at once", file=sys.stderr)
        elif time.monotonic() - self._at > 1:
            self._restore(number)
            signal.raise_signal(number)

    def interrupted(self, step: int, where: object) -> Interrupted:
        number = self.received or signal.SIGTERM  # None: another process was told
        return Interrupted(
            f"{signal.Signals(number).name} after step {step}: saved {where}. To go on, give the "
            "same command with --resume_from_checkpoint last",
            128 + number,
        )
