"""The output folder: its lock, the checkpoint to resume, and leftovers of earlier runs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rosa_train.config import TrainArguments, expect
from rosa_train.run import checkpoint as checkpoints
from rosa_train.run import metrics

# The files and folders that a run writes, beside checkpoints.
_OWN = (
    "metrics.jsonl",
    "args.json",
    "predictions.jsonl",
    "result.json",
    "adapter",
    "model",
    "tensorboard",
)
# Of these, what a run leaves when it has trained something.
_RESULTS = ("metrics.jsonl", "predictions.jsonl", "result.json", "adapter", "model")


class FolderLock:
    """A context in which no other run can write into a folder.

    The lock is `flock` on the file run.lock. The system releases it when the process ends, also
    when it is killed. The file stays. A file system without locks is used without one.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Takes the lock of the folder, which must exist.

        Raises:
            ValueError: another run has it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = (self._out / "run.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            expect(False, "output_dir", "a folder without a run in progress", self._out)
        except OSError:
            file.close()
        else:
            self._file = file

    def take_if_there(self) -> None:
        """Takes the lock if the folder exists. Bad input makes no folder, so it may not."""
        if self._out.is_dir():
            self.take()

    def take_before_writing(self, args: TrainArguments, resumed_from: Path | None) -> None:
        """Makes the folder and takes the lock, unless this has it.

        Raises:
            ValueError: another run has the lock, or has written into the folder meanwhile.
        """
        if self._file is None:
            self._out.mkdir(parents=True, exist_ok=True)
            self.take()
            same = starting_point(self._out, args) == resumed_from
            expect(same, "output_dir", "a folder that no other run has changed", self._out)


def finished_arguments(out: Path, args: TrainArguments) -> dict[str, Any] | None:
    """The arguments of a complete run that is to be resumed, or None.

    Raises:
        ValueError: result.json does not have them.
    """
    path = out / "result.json"
    if args.resume_from_checkpoint != "last" or not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["arguments"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the result of a run, got {error!r}") from error


def starting_point(out: Path, args: TrainArguments) -> Path | None:
    """The checkpoint from which to resume, or None to start from the beginning."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    expect(there.is_dir(), "output_dir", "a folder", f"the file {there}")
    wanted = args.resume_from_checkpoint
    saved = checkpoints.checkpoints(out)
    if wanted == "last":
        results = [name for name in _RESULTS if _is_there(out / name)]
        expect(
            bool(saved) or not results, "resume_from_checkpoint",
            f"a checkpoint in {out}; --overwrite_output_dir starts again, and another "
            "--output_dir keeps what is there",
            f"a run without one, with {', '.join(results)}",
        )  # fmt: skip
        return saved[-1] if saved else None
    if wanted is not None:
        expect(Path(wanted).is_dir(), "resume_from_checkpoint", "`last` or a folder", wanted)
        return Path(wanted)
    own = [name for name in _OWN if (out / name).exists()] + [path.name for path in saved]
    if args.overwrite_output_dir:
        # A folder of another kind may have a `model` or `adapter`, too.
        is_run = bool({"args.json", "metrics.jsonl"} & set(own)) or bool(saved)
        expect(
            is_run or not own, "overwrite_output_dir",
            "a folder with a run (args.json)", f"{out} with {', '.join(own)}",
        )  # fmt: skip
        return None
    expect(
        not own, "output_dir",
        "a folder without a run, --overwrite_output_dir or --resume_from_checkpoint last",
        f"{out} with {', '.join(own)}",
    )  # fmt: skip
    return None


def _is_there(path: Path) -> bool:
    """Whether there is a folder, or a file that is not empty."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.is_dir() or path.stat().st_size > 0
    return False


def prepare_folder(
    out: Path, args: TrainArguments, resumed_from: Path | None, state: checkpoints.State
) -> None:
    """Prepares the folder for the run.

    A resumed run finds the folder as it was when the checkpoint was written. Any other run finds
    nothing of an earlier one.
    """
    checkpoints.clean(out)
    (out / "result.json").unlink(missing_ok=True)
    if args.overwrite_output_dir:
        for path in [*(out / name for name in _OWN), *checkpoints.checkpoints(out)]:
            if path.is_dir():
                checkpoints.remove(path)
            else:
                path.unlink(missing_ok=True)
    source = out if resumed_from is None else resumed_from.absolute().parent
    metrics.cut(source / "metrics.jsonl", state.metrics_lines, out / "metrics.jsonl")
    if resumed_from is not None and source == out.absolute():
        # A run that resumes an earlier checkpoint replaces the later ones.
        for path in reversed(checkpoints.checkpoints(out)):
            if path.absolute() == resumed_from.absolute():
                break
            checkpoints.remove(path)
