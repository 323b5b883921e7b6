"""`accelerate-tts bench`: runs the systems one by one, prints a table, writes JSON and a chart."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate_tts.cli.bench import chart, processes, report
from accelerate_tts.cli.bench.measure import Measured, Ratio
from accelerate_tts.cli.bench.naive import Naive
from accelerate_tts.cli.bench.processes import VariantError
from accelerate_tts.cli.bench.report import Found
from accelerate_tts.cli.bench.results import document
from accelerate_tts.cli.bench.systems import PARTS, SYSTEMS, system_of
from accelerate_tts.cli.bench.variant import Request
from accelerate_tts.cli.lines import say
from accelerate_tts.cli.output import Files
from accelerate_tts.cli.tables import table, wide_console
from accelerate_tts.errors import AccelerateTTSError, SettingsError
from accelerate_tts.settings import check_precision, check_tune_seconds
from accelerate_tts.storage.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from accelerate_tts.cli.bench.systems import Size
    from accelerate_tts.cli.bench.variant import Variant
    from accelerate_tts.settings import Precision


@dataclass(frozen=True)
class Options:
    """Options of the command; see `accelerate-tts bench --help`."""

    size: Size = "full"
    precisions: tuple[Precision, ...] = ("exact",)
    layers: int | None = None
    pairs: int = 3
    tune_seconds: float = 180.0
    tokens: int | None = None
    warm_start: bool = False
    naive: bool = False
    json: Path | None = None
    plot: Path | None = None
    python: Path | None = None


def run(systems: Sequence[str], options: Options) -> None:
    """Bench systems in sequence, each variant in a process of its own.

    Args:
        systems: Names of `SYSTEMS` or `PARTS`, or "all".
        options: The command's options.

    Raises:
        SettingsError: A name, a precision or a length is invalid.
        MissingExtraError: matplotlib is needed for the chart and not installed.
        AccelerateTTSError: No variant gave a figure.
        OutputError: A file could not be written at the end.
    """
    names = _checked(systems, options)
    found: list[Found] = []
    files = Files()
    for name in names:
        found.append(Found(name))
        with tempfile.TemporaryDirectory() as folder:
            for _ in _Bench(found[-1], options, Path(folder)).variants():
                if options.json is not None:  # after each, since the next may take minutes
                    files = Files()  # what the last one leaves counts
                    with files.writing(options.json):
                        write_whole(options.json, json.dumps(document(found, options), indent=2))
    if not any(one.runs for one in found):
        raise AccelerateTTSError("; ".join(line for one in found for line in report.summaries(one)))
    if options.plot is not None:
        with files.writing(options.plot):
            chart.draw(found, options.plot)
    numbers = {"eager", "tuned", "ratio", "error", "floor"}
    wide_console().print(table(report.rows(found), "Untouched against tuned", numbers))
    wide_console(200).print(table(report.overview(found), "Times as fast as untouched, whole call", set()))
    for line in (line for one in found for line in report.summaries(one)):
        say(line)
    files.check()


def _checked(systems: Sequence[str], options: Options) -> list[str]:
    names = list(dict.fromkeys(SYSTEMS if "all" in systems else systems))
    for name in names:
        if name not in SYSTEMS and name not in PARTS:
            raise SettingsError(f"{name!r} is not one of {', '.join([*SYSTEMS, *PARTS])}, all")
        if options.tokens is not None and system_of(name).rate is None and "all" not in systems:
            those = ", ".join(name for name, system in SYSTEMS.items() if system.rate is not None)
            raise SettingsError(f"--tokens {options.tokens}: {name} writes no tokens; {those} do")
    for precision in options.precisions:
        check_precision(precision)
    check_tune_seconds(options.tune_seconds)
    for option, path in (("--json", options.json), ("--plot", options.plot)):  # checked before minutes of tuning
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SettingsError(f"{option} {path}: name a file in an existing folder")
    if options.plot is not None:
        chart.pyplot()
    return names


class _Bench:
    """Measures the variants of one system. A variant that fails is noted, and the others go on."""

    def __init__(self, found: Found, options: Options, folder: Path) -> None:
        self._found = found
        self._options = options
        self._folder = folder

    def variants(self) -> Iterator[None]:
        """Measure the variants in sequence; yield after each."""
        eager = self._ask("eager", "eager")
        yield
        if eager is None:
            return  # a system that cannot be loaded cannot be tuned
        self._found.cold, self._found.peak = eager["seconds"], eager["peak"]
        if self._options.naive:
            naive = self._ask("torch.compile", "naive")
            if naive is not None:
                naive["whole"] = _ratio(naive["whole"])
                self._found.naive = Naive(**naive)
            yield
        for precision in self._options.precisions:
            yield from self._ours(precision)

    def _ours(self, precision: Precision) -> Iterator[None]:
        answer = self._ask(precision, "tuned", precision)
        if answer is not None:
            for name in ("whole", "step", "prompt"):
                answer[name] = _ratio(answer[name])
            self._found.runs.append(Measured(**answer))
        yield
        if answer is not None and self._options.warm_start:
            warm = self._ask(f"warm start, {precision}", "restored", precision)
            if warm is not None:
                run = replace(self._found.runs[-1], warm_start=warm["seconds"], warm_peak=warm["peak"])
                self._found.runs[-1] = run
            yield

    def _ask(self, what: str, variant: Variant, precision: Precision = "exact") -> dict[str, Any] | None:
        name, o = self._found.system, self._options
        request = Request(variant, name, o.size, precision, o.layers, o.pairs, o.tune_seconds, o.tokens)
        say(f"{name}, {what}, {o.size} ...")
        try:
            return processes.ask(request, self._folder / precision, o.python)
        except VariantError as error:
            self._found.failed[what] = str(error)
            say(f"{name}, {what}: failed: {error}")
            return None


def _ratio(told: dict[str, Any] | None) -> Ratio | None:
    return None if told is None else Ratio(**told)
