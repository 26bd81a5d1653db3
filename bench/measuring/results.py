"""Result rows: one flat JSON object per line, appended and never changed.

A row is one (run, case, kernel, mode, charge). Ratios are computed from rows and never stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SCHEMA_VERSION = 1
STATUSES = ("ok", "incorrect", "unsupported", "oom", "error")

RUN_COLUMNS = ("schema_version", "run_id", "utc", "git_sha", "git_dirty", "argv")
DEVICE_COLUMNS = (
    *("device", "device_name", "threads", "torch", "cuda", "driver", "triton"),
    *("sm_clock_mhz", "allow_tf32"),
)
CASE_COLUMNS = ("case", "op", "m", "n", "k", "density", "nnz", "dtype", "mask", "seed")
KERNEL_COLUMNS = ("kernel", "backend", "mode", "charge", "status", "reason")
# `timer` is a name of bench/measuring/clocks.py. In files without this column it is read as null.
TIME_COLUMNS = ("samples_s", "median_s", "p20_s", "p80_s", "calls_per_sample", "timer")
SIZE_COLUMNS = ("flops", "bytes", "output_bytes", "peak_bytes", "workspace_bytes", "max_err")
# These columns describe a layer in training. They are null in other rows and in files without them.
# `held_bytes` stays from one step to the next and includes weights and inputs.
# `live_bytes` is the peak of live tensors beyond that. `saved_bytes` is saved for backward.
LAYER_COLUMNS = ("rank", "dropout", "trainable", "held_bytes", "live_bytes", "saved_bytes")
COLUMNS = (
    *RUN_COLUMNS,
    *DEVICE_COLUMNS,
    *CASE_COLUMNS,
    *KERNEL_COLUMNS,
    *TIME_COLUMNS,
    *SIZE_COLUMNS,
    *LAYER_COLUMNS,
)


class ResultsError(ValueError):
    """A results file that cannot be read. The message has file, line and reason."""


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file. The file is created if it is missing.

    Raises:
        ValueError: a row lacks a column, has an unknown column, or its status contradicts its time.
            Nothing is written then.
    """
    lines = []
    for row in rows:
        _check(row)
        lines.append(json.dumps(row, allow_nan=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read(path: Path) -> list[Row]:
    """All rows of a file, in the order written.

    Raises:
        ResultsError: the file is missing, or a line is not a row of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: expected a results file, got {error}") from error
    return list(_parse(path, text))


def _parse(path: Path, text: str) -> Iterator[Row]:
    # Lines end only at line feeds. str.splitlines would also end them at U+2028.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            if row.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(
                    f"expected schema_version {SCHEMA_VERSION}, got {row.get('schema_version')!r}"
                )
            row = dict.fromkeys(("timer", *LAYER_COLUMNS)) | row
            _check(row)
        except ValueError as error:  # json.JSONDecodeError is a ValueError
            raise ResultsError(f"{path}:{number}: {error}") from error
        yield row


def latest_run(rows: list[Row]) -> list[Row]:
    """The rows of the run that was written last."""
    return [row for row in rows if row["run_id"] == rows[-1]["run_id"]] if rows else []


def key(row: Row) -> tuple[Any, ...]:
    """The columns by which rows of different runs are matched."""
    return tuple(row[c] for c in ("device", "threads", "case", "kernel", "mode", "charge"))


def _check(row: Row) -> None:
    missing, unknown = set(COLUMNS) - set(row), set(row) - set(COLUMNS)
    if missing or unknown:
        raise ValueError(
            f"expected the columns of schema {SCHEMA_VERSION}, "
            f"got missing {sorted(missing)} and unknown {sorted(unknown)}"
        )
    if row["status"] not in STATUSES:
        raise ValueError(f"expected a status among {', '.join(STATUSES)}, got {row['status']!r}")
    timed = row["median_s"] is not None
    if timed != (row["status"] == "ok") or timed != bool(row["samples_s"]):
        raise ValueError(
            f"expected times if and only if status is ok, got status {row['status']!r} "
            f"and median_s {row['median_s']!r}"
        )
    if row["status"] != "ok" and not row["reason"]:
        raise ValueError(f"expected a reason for status {row['status']!r}, got none")
