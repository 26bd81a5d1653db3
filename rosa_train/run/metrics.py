"""Writes a run's metrics.jsonl, TensorBoard points and progress bar, and measures peak memory.

metrics.jsonl has one flat JSON object per line, and is the only source of all summaries. A resumed
run first cuts it back to the checkpoint, so that it holds each step once.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rosa_train.files import json_lines, json_text, read_json_lines, write_file

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

# Without a progress bar, the seconds between two lines that say how far the run is.
LINE_SECONDS = 60.0


class PeakMemory:
    """The peak memory since `reset`, in bytes.

    On CUDA it is the memory that torch's allocator gave out. On a CPU it is the resident set of the
    process, with libraries (about 500 MB with torch and transformers). Outside Linux, and if /proc
    is not writable, it is the peak since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Starts a new measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform.startswith("linux"):
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # gives back what an earlier phase freed
                libc.malloc_trim(0)
            try:
                _CLEAR.write_text("5")  # sets VmHWM, the peak, to the present size
            except OSError:
                return

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Metrics:
    """Writes a run's metrics. Only the first process (`main`) does; the others do nothing.

    `start` is the number of steps already done. The progress bar starts there, and TensorBoard
    drops the later points of an interrupted run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        main: bool,
        start: int,
        total: int,
        report_to: str = "none",
        every: int = 1,
        progress: bool = True,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._main = main
        self._every = every
        self._board: Any = None
        self._bar: Any = None
        self._start, self._total = start, total
        self._began = time.monotonic()
        self._said_at = -math.inf
        self.lines = 0
        if not main:
            return
        self.lines = len(read(self._path))
        self._file = self._path.open("a", encoding="utf-8")
        if report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"--report_to tensorboard: expected the package tensorboard, got {error}"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        if progress and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def write(self, step: int, phase: str, **numbers: Any) -> None:
        """Writes one line. Values that are None are left out."""
        if not self._main:
            return
        numbers = {name: value for name, value in numbers.items() if value is not None}
        # With one write call per line, a killed process can tear only the last line.
        self._file.write(json_text({"step": step, "phase": phase, **numbers}) + "\n")
        self._file.flush()
        self.lines += 1
        is_step = phase in ("warmup", "train")
        due = step % self._every == 0 or not is_step
        if self._board is not None and due:
            for name, value in numbers.items():
                self._board.add_scalar(f"{'train' if is_step else phase}/{name}", value, step)
        if self._bar is not None and is_step:
            self._bar.update(1)
            if due:
                self._bar.set_postfix(phase=phase, loss=f"{numbers['loss']:.3f}", refresh=False)
        elif is_step:
            self._say_progress(step, numbers)

    def say(self, text: str) -> None:
        """Prints a line for people on stderr, without breaking the progress bar."""
        if self._main:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def _say_progress(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Says now and then how far the run is: the only sign of life in a log."""
        now = time.monotonic()
        if now - self._said_at < LINE_SECONDS:
            return
        self._said_at = now
        # Masks and evaluations so far are counted, as there may be more of them.
        left = (now - self._began) / (step - self._start) * (self._total - step)
        self.say(
            f"step {step:,} of {self._total:,}: loss {numbers['loss']:.4f}, "
            f"{numbers['tokens_per_s']:,.0f} tokens/s, {_duration(left)} left"
        )

    def sync(self) -> None:
        """Waits until metrics.jsonl is on the disk. A checkpoint relies on it."""
        if self._main:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._main:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none if it is missing. A torn last line is left out.

    Raises:
        ValueError: a complete line is not JSON. The message has file and line.
    """
    return read_json_lines(path) if path.exists() else []


def cut(source: Path, lines: int, target: Path) -> None:
    """Makes `target` the first `lines` lines of `source`, atomically. Both may be one file."""
    rows = read(source)[:lines]
    write_file(target, json_lines(rows))


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a run's lines, as fields of `Result`.

    `seconds` is the sum over a phase's lines, and `peak_bytes` the maximum. `tokens` counts the
    tokens read in training. `tokens_per_s` divides them by the seconds of the steps only.
    """
    losses: list[float] = []
    eval_losses: dict[int, float] = {}
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    tokens, exact_match = 0, None
    for row in rows:
        phase = row["phase"]
        seconds[phase] = seconds.get(phase, 0.0) + row.get("seconds", 0.0)
        peak_bytes[phase] = max(peak_bytes.get(phase, 0), row.get("peak_bytes", 0))
        if phase in ("warmup", "train"):
            losses.append(row["loss"])
            tokens = row["tokens"]
        elif phase == "eval":
            eval_losses[row["step"]] = row["loss"]
        elif phase == "generate":
            exact_match = row["exact_match"]
    stepping = seconds.get("warmup", 0.0) + seconds.get("train", 0.0)
    return {
        "losses": losses,
        "eval_losses": eval_losses,
        "exact_match": exact_match,
        "tokens": tokens,
        "tokens_per_s": tokens / stepping if stepping else 0.0,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
    }
