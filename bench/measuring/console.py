"""Console output of the commands: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rosa_train.cli import tables


def show(table: tables.Table) -> None:
    """Print an empty line, then a table."""
    print()
    tables.show(table)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after each case, with a line about the case."""
    if not tables.on_terminal():
        width, done = len(str(total)), 0

        def line(text: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done:{width}}/{total}] {text}", flush=True)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
