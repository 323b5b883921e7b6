"""Figures as rich tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import printable
from accelerate_tts.receipts.format import duration

_NUMBERS = {"before", "after", "ratio", "error"}


def wide_console(width: int = 100) -> Terminal:
    """Make a console on standard output, as wide as the terminal, or of `width` columns in a file or a pipe."""
    console = Terminal()
    return console if console.is_terminal else Terminal(width=width)


def table(rows: Sequence[Sequence[str | Text]], title: str, numbers: set[str] = _NUMBERS) -> Table:
    """Make a table of rows, the header first. Columns named in `numbers` are right-aligned."""
    result = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    header, *body = rows
    for name in map(str, header):
        if name in numbers:
            result.add_column(name, justify="right", no_wrap=True)
        else:
            result.add_column(name, overflow="fold")  # with a least width, a narrow terminal would cut the last columns
    for row in body:
        result.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return result


def spread(times: Sequence[float]) -> str:
    """Format seconds as their median and, in brackets, the least and the most."""
    return f"{duration(statistics.median(times))} ({duration(min(times))} .. {duration(max(times))})"
