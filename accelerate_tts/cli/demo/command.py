"""`accelerate-tts demo`: speak a text plain and decorated alternately, and show the gain of the decorators."""

from __future__ import annotations

import statistics
import time
import wave
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from accelerate_tts.cli import receipt as receipts
from accelerate_tts.cli.demo.phonemes import sentences
from accelerate_tts.cli.output import Files, check_writable
from accelerate_tts.cli.progress import quiet, shown_events
from accelerate_tts.cli.tables import spread, table, wide_console
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import MissingExtraError
from accelerate_tts.receipts.format import duration, error_text
from accelerate_tts.storage.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from rich.console import Console

    from accelerate_tts.cli.demo.backends import DecoratedBackend, PlainBackend

# Characters of the timed text: enough for a meaningful median, short enough for a demo.
_TIMED_CHARACTERS = 200
_SEED = 0
_LOUDEST = 32767  # of samples of 16 bits
_LINE_EVERY = 5.0  # seconds between progress lines without a terminal


@dataclass(frozen=True)
class Comparison:
    """Times of both backends on the same text, in seconds; lists have one entry a call, taken alternately.

    Attributes:
        plain: Warm calls of the plain backend.
        decorated: Warm calls of the decorated one.
        plain_cold: The plain backend's first call after loading.
        decorated_cold: The decorated backend's first call after loading.
        plain_load: Seconds to load plain.
        decorated_load: Seconds to load, tune and warm up.
        audio: Seconds of speech in one call.
        error: Relative error of the decorated waveform against the plain one, under one seed.
    """

    plain: list[float]
    decorated: list[float]
    plain_cold: float
    decorated_cold: float
    plain_load: float
    decorated_load: float
    audio: float
    error: float

    @property
    def ratio(self) -> float:
        """Median of the paired ratios plain / decorated."""
        return statistics.median(a / b for a, b in zip(self.plain, self.decorated, strict=True))

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the demo's table, the header first."""

        def real_time(times: list[float]) -> str:
            return f"{statistics.median(times) / self.audio:.3f}"

        return [
            ("", "plain", "decorated"),
            ("load", duration(self.plain_load), f"{duration(self.decorated_load)}, tuning included"),
            ("cold first call", duration(self.plain_cold), duration(self.decorated_cold)),
            ("warm call", spread(self.plain), spread(self.decorated)),
            ("real-time factor", real_time(self.plain), real_time(self.decorated)),
            ("cold ratio", "1.00x", f"{self.plain_cold / self.decorated_cold:.2f}x"),
            ("warm ratio", "1.00x", f"{self.ratio:.2f}x"),
        ]


def run(text: str, output: Path, pairs: int, receipt_file: Path | None) -> None:
    """Speak `text`, write it to `output`, print the table and the receipt.

    Raises:
        NothingToSayError: Nothing in `text` can be pronounced.
        OutputError: A file cannot be written. This is checked before anything is spoken, and told at the end.
        MissingExtraError: The demo extra is not installed.
    """
    console = Terminal(stderr=True)
    pieces = sentences(text)
    for path in filter(None, (output, receipt_file)):
        check_writable(path)
    with console.status("importing torch"):  # a second or two
        import_module("torch")
    from accelerate_tts.optimizer import receipt_of

    files = Files()
    spoken: list[int] = []  # the number of samples, unless the file could not be written
    with quiet(), shown_events(console):
        plain, decorated, comparison = compare_backends(pieces, pairs, console)
        receipt = receipt_of(decorated)
        if receipt is not None and receipt_file is not None:
            with files.writing(receipt_file):
                receipt.save(receipt_file)
        with files.writing(output):
            spoken.append(_speak_to_file(decorated, pieces, output, console))
    out = wide_console()
    out.print(table(comparison.rows(), "Plain against decorated, in turn", {"plain", "decorated"}))
    out.print(
        f"{pairs} pairs of {comparison.audio:.1f} s of speech; same seed, waveforms: {error_text(comparison.error)}"
        f" (relative error {comparison.error:.1e})",
        style="dim",
    )
    if receipt is not None:
        receipts.show(receipt, out)
    del plain
    for frames in spoken:
        seconds = frames / decorated.voice.sampling_rate
        out.print(f"wrote {output}: {seconds:.1f} s of speech at {decorated.voice.sampling_rate} Hz")
    files.check()


def compare_backends(
    pieces: list[str], pairs: int, console: Console | None = None
) -> tuple[PlainBackend, DecoratedBackend, Comparison]:
    """Load both backends and time them alternately on about the first 200 characters of a text, under the same seed.

    The plain backend is first, so its cold call includes the one-time costs of the process, as for a user without a
    warm-up.
    """
    say: Callable[[str], object] = console.print if console is not None else lambda _text: None
    try:
        from accelerate_tts.cli.demo.backends import DecoratedBackend, PlainBackend
        from accelerate_tts.cli.demo.phonemes import NothingToSayError, to_ids
    except ImportError as error:
        raise MissingExtraError(f"the demo needs {error.name}: pip install 'accelerate_tts[demo]'") from error
    from accelerate_tts.tuning.compare import compare

    say("loading the voice, plain")
    plain, plain_load = _timed_load(PlainBackend)
    say("first call of the plain backend")
    text = timed_part(piece for piece in pieces if to_ids(plain.voice, piece))
    if not text:
        raise NothingToSayError(f"nothing in {pieces[0][:40]!r} can be pronounced; give a sentence of English")
    plain_cold, reference = _timed_call(plain, text)
    say("loading the voice, decorated: it is tuned, verified and warmed up now, once")
    decorated, decorated_load = _timed_load(DecoratedBackend)
    decorated_cold, candidate = _timed_call(decorated, text)
    say(f"timing {pairs} warm calls of each, in turn")
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(_timed_call((plain, decorated)[which], text)[0])
    comparison = Comparison(
        plain=times[0],
        decorated=times[1],
        plain_cold=plain_cold,
        decorated_cold=decorated_cold,
        plain_load=plain_load,
        decorated_load=decorated_load,
        audio=reference.shape[0] / plain.voice.sampling_rate,
        error=compare(reference, candidate).error,
    )
    return plain, decorated, comparison


def timed_part(pieces: Iterable[str]) -> str:
    """Return the first pieces of a text, at least one, as far as they are short enough to be timed."""
    timed = ""
    for piece in pieces:
        if timed and len(timed) + len(piece) > _TIMED_CHARACTERS:
            break
        timed = f"{timed}\n{piece}" if timed else piece
    return timed


def _timed_load(kind: Any) -> tuple[Any, float]:
    backend = kind()
    start = time.perf_counter()
    backend.load()
    return backend, time.perf_counter() - start


def _timed_call(backend: Any, text: str) -> tuple[float, torch.Tensor]:
    import torch

    torch.manual_seed(_SEED)
    start = time.perf_counter()
    waveform = backend.synthesize(text)
    return time.perf_counter() - start, waveform


def _speak_to_file(backend: DecoratedBackend, pieces: list[str], output: Path, console: Console) -> int:
    """Speak piece by piece into the file, in bounded memory; return the number of samples written.

    An older file stays as it is unless the whole was written.
    """
    import torch

    from accelerate_tts.cli.demo.phonemes import NothingToSayError

    frames = 0
    with replacing(output) as made, wave.open(str(made), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(backend.voice.sampling_rate)
        for piece in _progress(pieces, console):
            try:
                waveform = backend.synthesize(piece)
            except NothingToSayError:
                continue  # a line of dashes in a long text; a text of only such lines was refused before
            samples = (waveform.clamp(-1, 1) * _LOUDEST).round().to(torch.int16)
            file.writeframes(samples.numpy().tobytes())
            frames += len(waveform)
    return frames


def _progress(pieces: list[str], console: Console) -> Iterator[str]:
    columns = (TextColumn("speaking"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("speaking", total=len(pieces))
        last = time.monotonic()
        for number, piece in enumerate(pieces, 1):
            yield piece
            progress.advance(task)
            if not console.is_terminal and time.monotonic() - last > _LINE_EVERY:
                last = time.monotonic()
                console.print(f"speaking: {number} of {len(pieces)} sentences")
