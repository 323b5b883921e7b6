"""The commands and their options. What they do lies in the modules beside this one, imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from accelerate_tts._version import __version__
from accelerate_tts.errors import AccelerateTTSError

__all__ = ["app"]

app = typer.Typer(
    name="accelerate-tts",
    help="Make a PyTorch text-to-speech backend start warm, run faster and stay correct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True, highlight=False)


def _fail(message: object) -> NoReturn:
    _errors.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    text: Annotated[str, typer.Argument(help="What to say, in English.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the speech goes, a WAV file.")] = Path(
        "out.wav"
    ),
    pairs: Annotated[int, typer.Option(min=1, max=50, help="Warm calls to time of each, in turn.")] = 7,
    receipt: Annotated[Path | None, typer.Option(help="Also save the receipt as JSON here.")] = None,
) -> None:
    """Speak TEXT with a real voice, plain and decorated, and show what the decorators gave."""
    from accelerate_tts.cli.demo.command import run

    try:
        run(text, output, pairs, receipt)
    except (AccelerateTTSError, OSError) as error:
        _fail(error)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what this machine is, what is wrong with it for speech, and how to mend that."""
    from accelerate_tts.cli.doctor import run

    raise typer.Exit(run(as_json))


@app.command()
def receipt(
    file: Annotated[Path, typer.Argument(help="A receipt that was saved as JSON.")],
) -> None:
    """Show a saved receipt."""
    from accelerate_tts.cli.tables import print_receipt, wide_console
    from accelerate_tts.engine.receipt import Receipt

    try:
        loaded = Receipt.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _fail(f"{file}: {error}")
    print_receipt(loaded, wide_console())
