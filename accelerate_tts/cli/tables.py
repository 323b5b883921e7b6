"""Receipts and figures as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from accelerate_tts.receipts.receipt import Receipt

__all__ = ["print_receipt", "table", "wide_console"]

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
            result.add_column(name, overflow="fold")
    for row in body:
        result.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return result


def _two_lines(name: str, verdict: str) -> Text:
    return Text.assemble(printable(name), "\n", (printable(verdict), "dim"))


def print_receipt(receipt: Receipt, console: Console) -> None:
    """Print a receipt's table, versions and notes."""
    rows: list[tuple[str | Text, ...]] = [("part: stage", "before", "after", "ratio", "error")]
    rows += [(_two_lines(f"{s.part}: {s.stage}", s.verdict), *s.figures()) for s in receipt.stages]
    rows.append((_two_lines("the whole", receipt.verdict), *receipt.figures()))
    console.print(table(rows, printable(f"Receipt: {receipt.what} on {receipt.device}")))
    versions = ", ".join(f"{name} {version}" for name, version in receipt.versions.items())
    console.print(f"tuning took {receipt.seconds:.1f} s ({printable(versions)})", style="dim", markup=False)
    for note in receipt.notes:
        console.print(printable(f"note: {note}"), style="yellow", markup=False)
