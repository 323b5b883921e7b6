"""`accelerate-tts receipt`: a saved receipt as a table, as JSON or as a page. Never imports torch."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.text import Text

from accelerate_tts.cli.tables import table, wide_console
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import AccelerateTTSError, printable
from accelerate_tts.receipts.format import duration
from accelerate_tts.receipts.receipt import Receipt
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from accelerate_tts.receipts.receipt import StageResult

_MEND = "give a file that receipt.save('NAME.json') wrote"
_TABLE_WIDTH = 60  # columns; narrower terminals have no room for names beside figures, and get lines instead


class ReceiptFileError(AccelerateTTSError, ValueError):
    """The file is not a receipt, or the page cannot be written. The message names the file and the solution."""


def run(file: Path, page: Path | None, as_json: bool) -> None:
    """Print the receipt in `file`, and write it to `page` as HTML if given.

    Raises:
        ReceiptFileError: `file` is not a receipt, or `page` cannot be written. Nothing is printed then.
    """
    receipt = load(file)
    if page is not None:
        _write(receipt, page, file)
    if as_json:
        sys.stdout.write(receipt.to_json() + "\n")
    else:
        show(receipt, wide_console())
    if page is not None:  # on stderr, since stdout may be JSON for another program
        Terminal(stderr=True).print(f"wrote {page}", soft_wrap=True)


def load(file: Path) -> Receipt:
    """Read a receipt that was saved as JSON.

    Raises:
        ReceiptFileError: The file does not exist, cannot be read, or is not a receipt of this format.
    """
    try:
        return Receipt.from_json(file.read_text(encoding="utf-8-sig"))  # editors and shells on Windows write a BOM
    except FileNotFoundError:
        raise ReceiptFileError(f"{file}: there is no such file; {_MEND}") from None
    except IsADirectoryError:
        raise ReceiptFileError(f"{file}: this is a folder; {_MEND}") from None
    except OSError as error:
        raise ReceiptFileError(f"{file}: cannot be read ({error.strerror or error}); {_MEND}") from error
    except UnicodeDecodeError as error:
        raise ReceiptFileError(f"{file}: this is a binary file, not a text; {_MEND}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ReceiptFileError(f"{file}: this is not JSON ({error.msg}, {where}); {_MEND}") from error
    except ValueError as error:
        raise ReceiptFileError(f"{file}: {error}; {_MEND}") from error


def _write(receipt: Receipt, page: Path, file: Path) -> None:
    try:
        if page.exists() and page.samefile(file):
            raise ReceiptFileError(f"{page}: the page would replace the receipt itself; give --html another name")
        write_whole(page, receipt.to_html())
    except OSError as error:
        why = error.strerror or error
        raise ReceiptFileError(f"{page}: cannot be written ({why}); give --html a file in a folder of yours") from error


def show(receipt: Receipt, console: Console) -> None:
    """Print a receipt: all stages (green if kept, otherwise dim), the whole object, the versions and the notes."""
    rows: list[tuple[str, StageResult | Receipt, str]] = [
        (f"{stage.part}: {stage.stage}", stage, "green" if stage.kept else "dim") for stage in receipt.stages
    ]
    rows.append(("the whole", receipt, "bold"))
    title = printable(f"Receipt: {receipt.what} on {receipt.device}")
    if console.width < _TABLE_WIDTH:
        _line(console, title, "bold")
        for name, timed, style in rows:
            before, after, ratio, error = timed.figures()
            _line(console, f"{name}: {before}, now {after} ({ratio}, {error}), {timed.verdict}", style)
    else:
        header = ("part: stage", "before", "after", "ratio", "error")
        console.print(table([header, *(_row(*row) for row in rows)], title))
    versions = ", ".join(f"{name} {version}" for name, version in receipt.versions.items())
    cold = "" if receipt.cold is None else f"cold first pass {duration(receipt.cold)}, "
    first = "" if receipt.first_audio is None else f"first audio after {duration(receipt.first_audio)}, "
    _line(console, f"{cold}{first}tuning took {receipt.seconds:.1f} s ({versions})", "dim")
    for note in receipt.notes:
        _line(console, f"note: {note}", "yellow")


def _row(name: str, timed: StageResult | Receipt, style: str) -> tuple[Text, ...]:
    return tuple(Text(cell, style) for cell in (f"{printable(name)}\n{printable(timed.verdict)}", *timed.figures()))


def _line(console: Console, text: str, style: str) -> None:
    console.print(printable(text), style=style, markup=False)
