"""The output folder: finds the checkpoint to resume, and clears leftovers of earlier runs."""

from __future__ import annotations

from pathlib import Path

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


def starting_point(out: Path, args: TrainArguments) -> Path | None:
    """The checkpoint from which to resume, or None to start from the beginning."""
    wanted = args.resume_from_checkpoint
    if wanted == "last":
        found = checkpoints.checkpoints(out)
        return found[-1] if found else None
    if wanted is not None:
        expect(Path(wanted).is_dir(), "resume_from_checkpoint", "`last` or a folder", wanted)
        return Path(wanted)
    if not args.overwrite_output_dir:
        there = [name for name in _OWN if (out / name).exists()]
        there += [path.name for path in checkpoints.checkpoints(out)]
        expect(
            not there, "output_dir",
            "a folder without a run, --overwrite_output_dir or --resume_from_checkpoint last",
            f"{out} with {', '.join(there)}",
        )  # fmt: skip
    return None


def prepare_folder(
    out: Path, args: TrainArguments, resumed_from: Path | None, state: checkpoints.State
) -> None:
    """Prepares the folder for the run.

    A resumed run finds the folder as it was when the checkpoint was written. Any other run finds
    nothing of an earlier one.
    """
    out.mkdir(parents=True, exist_ok=True)
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
