"""What a run reports: metrics.jsonl, TensorBoard, a progress bar, and the peak memory of a phase.

metrics.jsonl has one flat JSON object per line, appended, and is the only source of every summary:
a resumed run cuts it back to its checkpoint and goes on, so that it holds each step once.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rosa_train.files import write_file

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest memory since `reset`, in bytes.

    On CUDA what torch's allocator gave out. On the CPU the resident set of the whole process,
    libraries included (some 500 MB with torch and transformers); on Linux of the time since
    `reset`, elsewhere, and where /proc refuses, since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform.startswith("linux"):
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # what the phase before had freed is not this one's
                libc.malloc_trim(0)
            try:
                _CLEAR.write_text("5")  # sets VmHWM, the peak, to the present size
            except OSError:
                return

    def bytes(self) -> int:
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
    """Writes a run's metrics; on all processes but the first it does nothing.

    `start` is the step that the run begins after, for the progress bar and for TensorBoard, which
    is told to drop what an interrupted run wrote beyond it.
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
        """One line; values that are None are left out."""
        if not self._main:
            return
        numbers = {name: value for name, value in numbers.items() if value is not None}
        # One write call: a killed process leaves whole lines, or one torn line at the end.
        self._file.write(json.dumps({"step": step, "phase": phase, **numbers}) + "\n")
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

    def say(self, text: str) -> None:
        """A line for people, on stderr, which does not break the bar."""
        if self._main:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def sync(self) -> None:
        """The file is on the disk: what a checkpoint counts on."""
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


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line, of a process killed in it, is left out.

    Raises:
        ValueError: a line before the last is not JSON; the message has file and line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends in a newline
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"metrics: {path}:{number}: expected JSON, got {error}") from error
    return rows


def cut(source: Path, lines: int, target: Path) -> None:
    """`target` becomes the first `lines` lines of `source`, atomically; they may be one file."""
    rows = read(source)[:lines]
    write_file(target, "".join(json.dumps(row) + "\n" for row in rows))


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lines of a run come to: `losses`, `eval_losses`, `seconds`, `peak_bytes`, ...

    `seconds` and `peak_bytes` are per phase: the sum, and the maximum, over its lines. `tokens`
    counts those that the model read in training; `tokens_per_s` is over the steps alone.
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
