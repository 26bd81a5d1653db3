"""What the command line shows: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from .table import Table


def _rich() -> bool:
    if not sys.stdout.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def show(table: Table) -> None:
    """Print a table."""
    if not _rich():
        print(f"\n{table.text()}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i < table.texts else "right", no_wrap=i == 0)
    for row in table.rows:
        shown.add_row(*row)
    Console().print(shown)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each case, with a line about it."""
    if not _rich():
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
