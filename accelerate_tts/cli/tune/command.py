"""`accelerate-tts tune`: load the user's own backend, and compare it untouched and tuned on a text of the user."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from accelerate_tts.cli import receipt as receipts
from accelerate_tts.cli.backend import BackendError, find, values_of
from accelerate_tts.cli.output import Files, check_writable
from accelerate_tts.cli.progress import quiet, shown_events
from accelerate_tts.cli.tables import spread, table, wide_console
from accelerate_tts.cli.terminal import Terminal
from accelerate_tts.errors import printable
from accelerate_tts.events import Event, NotApplied, Restored, WarmupFailed, add_hook
from accelerate_tts.receipts.format import duration, error_text
from accelerate_tts.settings import Settings, is_active
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate_tts.cli.backend import Backend
    from accelerate_tts.cli.tune.listening import Judgement
    from accelerate_tts.cli.tune.sound import Sound
    from accelerate_tts.receipts.receipt import Receipt
    from accelerate_tts.tuning.compare import Difference


_PATIENCE = 30.0  # total seconds that the timing waits for a quiet machine
_NO_SOUND = "no sound was found in the output; let the method return the waveform"


@dataclass(frozen=True)
class TuneOptions:
    """Options of the command; see `accelerate-tts tune --help`."""

    method: str | None = None
    load: str | None = None
    arguments: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    pairs: int = 3
    rate: int | None = None
    html: Path | None = None
    receipt: Path | None = None
    listen: bool = False
    word_error_limit: float | None = None
    similarity_limit: float | None = None

    @property
    def judges(self) -> bool:
        """True if the sounds are to be judged."""
        return self.listen or self.word_error_limit is not None or self.similarity_limit is not None


@dataclass(frozen=True)
class Result:
    """Measurements of a backend, untouched and tuned.

    Attributes:
        name: Class and method.
        text: The text.
        times: Seconds of warm calls, untouched and tuned in turn.
        load: Seconds of the decorated load, with tuning or a warm pack.
        first: Seconds of the first call after it.
        difference: Difference of the outputs under one seed.
        before: Sound of the untouched object, if there is any in its output.
        after: Sound of the tuned one, likewise.
        receipt: The receipt.
        pack: What became of the warm pack, as a sentence.
        disturbed: Number of pairs during which other programs used the machine.
        disturbance: The disturbance in words; "" if there was none.
        judgement: Word errors and speaker similarity, if they were asked for.
    """

    name: str
    text: str
    times: list[tuple[float, float]]
    load: float
    first: float
    difference: Difference
    before: Sound | None
    after: Sound | None
    receipt: Receipt
    pack: str
    disturbed: int
    disturbance: str
    judgement: Judgement | None = None

    @property
    def ratio(self) -> float:
        """Median of the paired ratios untouched / tuned."""
        return statistics.median(before / after for before, after in self.times)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table, the header first."""
        ratios = sorted(before / after for before, after in self.times)
        sides: list[list[float]] = [[pair[side] for pair in self.times] for side in (0, 1)]
        rows: list[tuple[str, ...]] = [
            ("", "untouched", "tuned"),
            ("first call", duration(self.receipt.cold), duration(self.first)),
            ("warm call", *map(spread, sides)),
            ("warm ratio", "1.00x", f"{self.ratio:.2f}x ({ratios[0]:.2f} .. {ratios[-1]:.2f})"),
        ]
        if self.before is not None and self.after is not None:
            pieces = zip(sides, (self.before, self.after), strict=True)
            rows.append(("real-time factor", *(f"{statistics.median(s) / one.seconds:.3f}" for s, one in pieces)))
            rows.append(("speech", *(f"{one.seconds:.2f} s at {one.rate} Hz" for one in (self.before, self.after))))
        return rows + ([] if self.judgement is None else self.judgement.rows())

    @property
    def sameness(self) -> str:
        """Difference of the outputs, as a sentence."""
        found = self.difference
        if found.reason:
            return f"the outputs cannot be compared: {found.reason}"
        if found.error == 0.0:
            return "the outputs are the same, bit for bit (one seed)"
        below = -20.0 * math.log10(found.error)
        spectra = "" if found.spectral is None else f", and their spectra by {found.spectral:.2g} dB"
        return f"the outputs differ by {error_text(found.error)}, {below:.0f} dB below the sound{spectra} (one seed)"

    @property
    def remarks(self) -> list[str]:
        """Further sentences for the user."""
        found = [self.sameness, self.pack]
        if self.before is None:
            found.append(_NO_SOUND)
        elif self.before.assumed:
            found.append(f"the backend tells no sampling rate: {self.before.rate} Hz is assumed; give --rate HZ")
        if self.before is not None and self.before.fault:
            found.append(f"the untouched model's own sound {self.before.fault}, so a comparison with it says little")
        if self.disturbed:
            found.append(f"{self.disturbed} of {len(self.times)} pairs were disturbed: {self.disturbance}")
        return found


def run(target: str, text: str, options: TuneOptions) -> None:
    """Load a backend decorated, time its method untouched and tuned, and show both.

    Args:
        target: `module:Class`.
        text: What is spoken.
        options: The command's options.

    Raises:
        BackendError: The backend cannot be found, made, loaded or called.
        OutputError: A file cannot be written. This is checked before anything is loaded, and told at the end.
        MissingExtraError: A judge of the sound is not installed.
        AccelerateTTSError: The decorators are off, or an option of them is invalid; or the tuned sound has too many
            word errors.
    """
    if not text.strip():
        raise BackendError(f"--text {text!r} is empty; give a sentence")
    for path in filter(None, (options.html, options.receipt)):
        check_writable(path)
    if not is_active():
        raise BackendError("the decorators are off; unset ACCELERATE_TTS_DISABLE to tune")
    arguments, init = values_of(options.arguments, "--arg"), values_of(options.init, "--init")
    console = Terminal(stderr=True)
    with console.status("importing torch"):
        import_module("torch")
    if options.judges:
        from accelerate_tts.cli.tune.listening import check_installed

        check_installed()
    with quiet(), shown_events(console):
        backend = find(target, options.load)
        made = backend.made(init)
        method = backend.method(made, options.method, arguments)
        speak = backend.call(made, method, text, arguments)
        result = _measured(backend, made, f"{backend.name}.{method}", text, speak, options, console.print)
        if options.judges:
            result = _judged(result, console.print)
    _show(result, options)
    if result.judgement is not None:
        objection = result.judgement.objection(options.word_error_limit, options.similarity_limit)
        if objection:
            raise BackendError(objection)


def _show(result: Result, options: TuneOptions) -> None:
    """Write the files that were asked for, and print a result. Files come first: standard output may be closed.

    Raises:
        OutputError: A file could not be written. Everything else is written and printed by then.
    """
    files = Files()
    if options.receipt is not None:
        with files.writing(options.receipt):
            result.receipt.save(options.receipt)
    page_written = False
    if options.html is not None:
        from accelerate_tts.cli.tune.page import to_html

        with files.writing(options.html):
            write_whole(options.html, to_html(result))
            page_written = True
    out = wide_console()
    out.print(table(result.rows(), f"{result.name}, untouched against tuned, in turn", {"untouched", "tuned"}))
    for line in result.remarks:
        out.print(printable(line), soft_wrap=True)
    receipts.show(result.receipt, out)
    if page_written:
        out.print(f"wrote {printable(options.html)}", soft_wrap=True)
    files.check()


def _judged(result: Result, say: Callable[[str], object]) -> Result:
    """Return the result with its sounds judged, on the receipt, too."""
    from accelerate_tts.cli.tune.listening import judge

    if result.before is None or result.after is None:
        raise BackendError(_NO_SOUND)
    say("listening to both")
    judgement = judge(result.text, result.before, result.after)
    receipt = replace(result.receipt, notes=(*result.receipt.notes, judgement.note))
    return replace(result, judgement=judgement, receipt=receipt)


def _measured(  # noqa: PLR0913, PLR0917 - what the command knows by then
    backend: Backend, made: Any, name: str, text: str, speak: Callable[[], Any], options: TuneOptions,
    say: Callable[[str], object],
) -> Result:  # fmt: skip
    import torch

    from accelerate_tts.cli.bench.measure import undisturbed
    from accelerate_tts.cli.tune.sound import sound_of
    from accelerate_tts.optimizer import get_performance_optimizer
    from accelerate_tts.runtime.seeding import seeded
    from accelerate_tts.tuning.compare import compare
    from accelerate_tts.tuning.disturbance import Watcher
    from accelerate_tts.tuning.policy import current_policy
    from accelerate_tts.tuning.timing import synchronize

    optimizer = get_performance_optimizer()
    device = optimizer.initialize().type
    say(f"loading {backend.name} by {backend.load}(): it is tuned, verified and warmed up now, once")
    load, receipt, pack = _loaded(backend, made)

    def spoken() -> tuple[float, Any]:
        with seeded(device):
            synchronize(device)
            start = time.perf_counter()
            output = speak()
            synchronize(device)
            return time.perf_counter() - start, output

    say(f"speaking {text[:60]!r} by {name}")
    first, found = spoken()
    with optimizer.untouched(made):
        expected = spoken()[1]
    times: list[tuple[float, float]] = []

    def pair() -> None:
        with optimizer.untouched(made):
            before = spoken()[0]
        times.append((before, spoken()[0]))

    say(f"timing {options.pairs} warm calls of each, in turn")
    watcher = Watcher(current_policy().machine(), torch.get_num_threads(), _PATIENCE)
    disturbed = undisturbed(pair, (times,), options.pairs, watcher)
    return Result(
        name, text, times, load, first, compare(expected, found), sound_of(expected, made, options.rate),
        sound_of(found, made, options.rate), receipt, pack, disturbed, watcher.worst.why,
    )  # fmt: skip


def _loaded(backend: Backend, made: Any) -> tuple[float, Receipt, str]:
    """Load a backend; return the seconds, the receipt, and what became of the warm pack."""
    from accelerate_tts.optimizer import receipt_of
    from accelerate_tts.packs.store import pack_folder, pack_store

    heard: list[Event] = []
    forget = add_hook(heard.append)
    settings = Settings.from_environment()
    before = {entry.key: entry for entry in pack_store(settings).entries()} if settings.pack else {}
    start = time.perf_counter()
    try:
        result = backend.loaded(made)
    finally:
        forget()
    seconds = time.perf_counter() - start
    receipt = receipt_of(made) or (None if result is None else receipt_of(result))
    failed = [str(event) for event in heard if isinstance(event, WarmupFailed)]
    if failed or receipt is None:
        others = [str(event) for event in heard if isinstance(event, NotApplied)]
        why = "; ".join(failed or others) or "what was loaded holds no torch.nn.Module"
        raise BackendError(f"{backend.name}.{backend.load}() was not tuned: {why}; mend its warmup=, or what it loads")
    if not settings.pack:
        return seconds, receipt, "no warm pack was written: ACCELERATE_TTS_PACK=0; unset it to tune once only"
    folder = pack_folder(settings)
    if any(isinstance(event, Restored) for event in heard):
        return seconds, receipt, f"loaded from a warm pack of an earlier process, in {folder}"
    new = [entry for entry in pack_store(settings).entries() if entry.key not in before or entry != before[entry.key]]
    if new:
        size = decimal(sum(entry.bytes for entry in new))
        return seconds, receipt, f"the next process loads the warm pack {new[0].key[:12]} ({size}) in {folder}"
    return seconds, receipt, "no warm pack was written; give warmup= a call whose output can be compared"
