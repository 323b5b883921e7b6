"""Commands and their options. The modules beside this one implement them, and are imported when they run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from accelerate_tts._version import __version__
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import AccelerateTTSError, SettingsError, printable

if TYPE_CHECKING:
    from accelerate_tts.settings import Precision

app = typer.Typer(
    name="accelerate-tts",
    help="Make a PyTorch text-to-speech backend start warm, run faster and stay correct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pack = typer.Typer(help="Warm packs: what tuning found, kept for the next process.", no_args_is_help=True)
app.add_typer(pack, name="pack")
_errors = Terminal(stderr=True)


def _fail(message: object) -> NoReturn:
    lost: OSError | None = getattr(sys.stdout, "error", None)
    if lost is not None and message is lost:
        raise lost  # `main` says so, once
    _errors.print(f"error: {printable(message)}", style="red", soft_wrap=True)
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
    receipt: Annotated[
        Path | None, typer.Option(help="Also save the receipt here: as JSON, or as a page if it is named .html.")
    ] = None,
) -> None:
    """Speak TEXT with a real voice, plain and decorated, and show what the decorators gave."""
    from accelerate_tts.cli.demo.command import run

    try:
        run(text, output, pairs, receipt)
    except (AccelerateTTSError, OSError) as error:
        _fail(error)


@app.command()
def tune(  # noqa: PLR0913, PLR0917 - the options of a command
    backend: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CLASS", help="A class with an @optimized_model method and an @inference method."
        ),
    ],
    text: Annotated[str, typer.Option(help="What to speak.")],
    method: Annotated[str | None, typer.Option(help="The @inference method, if several take a text.")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another argument of that method; may be repeated.")
    ] = None,
    init: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An argument of the class; may be repeated.")
    ] = None,
    load: Annotated[str | None, typer.Option(help="The @optimized_model method, if there are several.")] = None,
    pairs: Annotated[int, typer.Option(min=1, max=50, help="Warm calls to time of each, in turn.")] = 3,
    rate: Annotated[
        int | None, typer.Option(min=4000, max=384_000, help="Sampling rate in Hz, if the backend tells none.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page: both sounds, their waveforms and spectrograms, the receipt.")
    ] = None,
    receipt: Annotated[
        Path | None, typer.Option(help="Also save the receipt here: as JSON, or as a page if it is named .html.")
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Also judge both sounds: English words by a recogniser, and the voice.")
    ] = False,
    word_error_limit: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Listen, and fail if the tuned sound has more word errors by over this."),
    ] = None,
    similarity_limit: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Listen, and fail if the voices are less alike than this; 1 is the same."),
    ] = None,
) -> None:
    """Tune your own backend, and compare it untouched and tuned; the next process takes the warm pack."""
    from accelerate_tts.cli.tune.command import TuneOptions, run

    try:
        options = TuneOptions(
            method, load, tuple(arg or ()), tuple(init or ()), pairs, rate, html, receipt, listen, word_error_limit,
            similarity_limit,
        )  # fmt: skip
        run(backend, text, options)
    except (AccelerateTTSError, OSError) as error:
        _fail(error)


@app.command()
def doctor(
    backend: Annotated[
        str | None, typer.Argument(metavar="[MODULE:CLASS]", help="Also load this backend, and say what is lost on it.")
    ] = None,
    init: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An argument of the class; may be repeated.")
    ] = None,
    load: Annotated[str | None, typer.Option(help="The @optimized_model method, if there are several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what this machine is, what is wrong with it for speech, and how to mend that."""
    from accelerate_tts.cli.doctor import run

    raise typer.Exit(run(as_json, backend, tuple(init or ()), load))


@app.command()
def bench(  # noqa: PLR0913, PLR0917 - the options of a command
    systems: Annotated[
        list[str],
        typer.Argument(
            help="chatterbox, higgs, voice-clone, mms, xtts; or all, one after the other."
            " Also decoders alone: t3, t3-multilingual, t3-turbo."
        ),
    ],
    size: Annotated[str, typer.Option(help="full: the true sizes; tiny: the same classes, in seconds.")] = "full",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="exact, balanced or fast; may be given several times. exact if not given, of all: each."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers, where memory is short.")] = None,
    pairs: Annotated[int, typer.Option(min=1, max=50, help="Pairs of calls, untouched and tuned in turn.")] = 3,
    tune_seconds: Annotated[float, typer.Option(min=1.0, help="The budget of tuning.")] = 180.0,
    tokens: Annotated[
        int | None, typer.Option(min=10, help="About so many tokens of speech a call, of systems that write tokens.")
    ] = None,
    warm_start: Annotated[
        bool | None, typer.Option("--warm-start/--no-warm-start", help="Also start again with the warm pack.")
    ] = None,
    naive: Annotated[
        bool | None, typer.Option("--naive/--no-naive", help="Also time torch.compile, put around the hot module.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here, in the format of benchmarks/results.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart here (matplotlib).")] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Bench the systems of another environment, by its interpreter; it needs this library, too."),
    ] = None,
) -> None:
    """Time the five systems with random weights, untouched against tuned. Run nothing else meanwhile.

    `all` runs every precision, torch.compile and the warm start, too, unless it is told otherwise: hours at full size.
    """
    from accelerate_tts.cli.bench.command import Options, run
    from accelerate_tts.settings import check_precision, check_tune_seconds

    try:
        if size not in {"tiny", "full"}:
            raise SettingsError(f"size={size!r} must be 'tiny' or 'full'")
        check_tune_seconds(tune_seconds)
        whole = "all" in systems
        chosen = precision or (["exact", "balanced", "fast"] if whole else ["exact"])
        for name in chosen:
            check_precision(name)
        options = Options(
            "tiny" if size == "tiny" else "full", tuple(cast("list[Precision]", chosen)), layers, pairs, tune_seconds,
            tokens, whole if warm_start is None else warm_start, whole if naive is None else naive, as_json, plot,
            python,
        )  # fmt: skip
        run(systems, options)
    except (AccelerateTTSError, OSError) as error:
        _fail(error)


@app.command()
def receipt(
    file: Annotated[Path, typer.Argument(help="A receipt that was saved as JSON.")],
    page: Annotated[Path | None, typer.Option("--html", help="Also write it as an HTML page here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show a saved receipt: what was tried, what it gave, what was kept and why."""
    from accelerate_tts.cli.receipt import run

    try:
        run(file, page, as_json)
    except AccelerateTTSError as error:
        _fail(error)


@pack.command("list")
def list_packs(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show the packs of this user, the most recently used first."""
    from accelerate_tts.cli.pack import show

    _run(lambda: show(as_json))


@pack.command("export")
def export_packs(file: Annotated[Path, typer.Argument(help="Where they go.")]) -> None:
    """Write all packs into one FILE, for another machine."""
    from accelerate_tts.cli.pack import export

    _run(lambda: export(file))


@pack.command("load")
def load_packs(file: Annotated[Path, typer.Argument(help="What `pack export` wrote.")]) -> None:
    """Take the packs of such a FILE."""
    from accelerate_tts.cli.pack import load

    _run(lambda: load(file))


@pack.command("clear")
def clear_packs() -> None:
    """Remove all packs of this user."""
    from accelerate_tts.cli.pack import clear

    _run(clear)


def _run(command: Callable[[], None]) -> None:
    try:
        command()
    except AccelerateTTSError as error:
        _fail(error)
