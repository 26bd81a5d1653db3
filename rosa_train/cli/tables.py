"""Tables: with rich on a terminal, as plain text elsewhere, as Markdown in files."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A titled table of strings. The first `texts` columns are text, the others numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    texts: int = 1

    def text(self) -> str:
        """The table as plain text with aligned columns."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        body = [
            "  ".join(
                cell.ljust(width) if i < self.texts else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in body)])

    def markdown(self) -> str:
        """The table without its title, as Markdown."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [self.columns, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def on_terminal() -> bool:
    """Whether stdout is a terminal and rich is installed."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def show(table: Table) -> None:
    """Print a table."""
    if not on_terminal():
        print(table.text())
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


def megabytes(count: float | None) -> str:
    """Bytes as decimal megabytes."""
    return "-" if count is None else f"{count / 1e6:,.0f}"
