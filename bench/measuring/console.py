"""What the commands say: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator

from rosa_train.cli import tables

# The exit status after Ctrl-C.
INTERRUPTED = 128 + signal.SIGINT


class UsageError(ValueError):
    """Arguments that parse but contradict each other or this machine."""


def show(table: tables.Table) -> None:
    """Print an empty line, then a table. No cell is cut, however narrow the terminal is."""
    print()
    width = shutil.get_terminal_size().columns
    if sys.stdout.isatty() and sum(_widths(table)) + 3 * len(table.columns) + 1 > width:
        print(narrow(table, width))
    else:
        tables.show(table)


def narrow(table: tables.Table, width: int) -> str:
    """A table whose rows take several lines each, for a terminal that is narrower than the table.

    The first cell is at the left, or on a line of its own if it would take a third of the width.
    The others follow, as many in a line as fit. Only a cell that is wider than a line is wrapped.
    """
    first, *widths = _widths(table)
    beside = first <= width // 3
    indent = 2 + (first + 2 if beside else 2)
    room = width - indent
    lines: list[list[int]] = []
    used = width
    for i, needed in enumerate(widths, start=1):
        if used + 2 + min(needed, room) > room:
            lines.append([])
            used = -2
        lines[-1].append(i)
        used += 2 + min(needed, room)

    def row(cells: list[str]) -> Iterator[str]:
        body = [line for columns in lines for line in side_by_side(cells, columns)]
        if beside:
            yield f"  {cells[0].ljust(first)}  {body[0]}".rstrip()
        else:
            yield from textwrap.wrap(cells[0], width, initial_indent="  ", subsequent_indent="  ")
        yield from (f"{'':{indent}}{line}".rstrip() for line in body[beside:])

    def side_by_side(cells: list[str], columns: list[int]) -> Iterator[str]:
        wrapped = [textwrap.wrap(cells[i], room, break_on_hyphens=False) or [""] for i in columns]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            yield "  ".join(
                part.ljust(widths[i - 1])
                if i < table.texts or len(columns) == 1
                else part.rjust(widths[i - 1])
                for i, part in zip(columns, parts, strict=True)
            )

    title = textwrap.wrap(table.title, width)
    return "\n".join(
        [*title, *row(table.columns), f"  {'-' * (width - 4)}"]
        + [line for cells in table.rows for line in row(cells)]
    )


def _widths(table: tables.Table) -> list[int]:
    rows = [table.columns, *table.rows]
    return [max(len(cells[i]) for cells in rows) for i in range(len(table.columns))]
