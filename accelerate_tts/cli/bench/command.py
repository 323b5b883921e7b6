"""`accelerate-tts bench`: runs the systems one by one, prints a table, writes JSON and a chart."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from accelerate_tts.cli.bench import report
from accelerate_tts.cli.bench.measure import Measured, bench, tuned
from accelerate_tts.cli.bench.systems import SYSTEMS
from accelerate_tts.cli.tables import table, wide_console
from accelerate_tts.errors import AccelerateTTSError, MissingExtraError, SettingsError
from accelerate_tts.events import Event, Trying, add_hook
from accelerate_tts.settings import Settings, check_precision, check_tune_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate_tts.cli.bench.systems import Size
    from accelerate_tts.settings import Precision

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """What the command was asked for; see `accelerate-tts bench --help`."""

    size: Size = "full"
    precisions: tuple[Precision, ...] = ("exact",)
    layers: int | None = None
    pairs: int = 3
    tune_seconds: float = 180.0
    warm_start: bool = False
    naive: bool = False
    json: Path | None = None
    plot: Path | None = None


def run(systems: Sequence[str], options: Options) -> None:
    """Bench systems, one after the other.

    Args:
        systems: Names of `SYSTEMS`, or "all".
        options: How.

    Raises:
        SettingsError: A name or precision that there is not.
        MissingExtraError: A system's package, or what draws the chart, is not installed.
    """
    names = list(SYSTEMS) if "all" in systems else list(systems)
    for name in names:
        if name not in SYSTEMS:
            raise SettingsError(f"{name!r} is not one of {', '.join(SYSTEMS)}, all")
    for precision in options.precisions:
        check_precision(precision)
    check_tune_seconds(options.tune_seconds)
    for option, path in (("--json", options.json), ("--plot", options.plot)):  # before minutes of tuning, not after
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SettingsError(f"{option} {path}: that is no file in a folder that exists")
    if options.plot is not None:
        _pyplot()
    warnings.simplefilter("ignore")
    remove = add_hook(_say_what_is_tried)
    try:
        found = _each(names, options)
    finally:
        remove()
    numbers = {"eager", "tuned", "ratio", "error", "floor"}
    wide_console().print(table(report.rows(found), "Untouched against tuned", numbers))
    if len(found) > 1:
        wide_console(160).print(table(report.overview(found), "Times as fast as untouched, whole call", set()))
    for one in found:
        _say(report.summary(one))
    if options.plot is not None and found:
        _draw(found, options.plot)


def _each(names: Sequence[str], options: Options) -> list[Measured]:
    found: list[Measured] = []
    for name, precision in itertools.product(names, options.precisions):
        _say(f"{name}, {precision}, {options.size}: building and tuning ...")
        try:
            found.append(_measured(name, precision, options))
        except Exception as error:  # memory, perhaps: what the other systems gave in an hour is not thrown away
            if len(names) == 1:
                raise
            _say(f"{name}, {precision} is left out: {type(error).__name__}: {error}")
            continue
        if options.json is not None:  # after each, since the next may take minutes
            options.json.write_text(json.dumps([_finite(one.as_dict()) for one in found], indent=2), "utf-8")
        gc.collect()
    return found


def _say(line: str) -> None:
    # At once, also into a file: a tuning takes minutes.
    typer.echo(line)
    sys.stdout.flush()


def _say_what_is_tried(event: Event) -> None:
    if isinstance(event, Trying):
        _say(f"  {event.what}: trying {event.stage}")


def _measured(name: str, precision: Precision, options: Options) -> Measured:
    naive = options.naive and precision == options.precisions[0]
    with tempfile.TemporaryDirectory() as packs:
        if options.warm_start:
            os.environ["ACCELERATE_TTS_PACK_FOLDER"] = packs
            # A folder of its own for what is compiled, so that it is all in the pack; the second process has another.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(packs) / "compiled")
        if options.warm_start or len(options.precisions) > 1:
            _forget_settings()
        one = bench(
            name, options.size, precision, layers=options.layers, pairs=options.pairs, seconds=options.tune_seconds,
            naive=naive,
        )  # fmt: skip
        if not options.warm_start:
            return one
        _say("  a second process, with the warm pack ...")
        return replace(one, warm_start=_warm_start(name, precision, options, Path(packs) / "another machine"))


def _forget_settings() -> None:
    """Let the shared optimizer read the environment again."""
    from accelerate_tts import optimizer

    setattr(optimizer, "_optimizer", optimizer.PerformanceOptimizer(Settings.from_environment()))  # noqa: B010


def _warm_start(name: str, precision: Precision, options: Options, compiled: Path) -> float:
    """Seconds until a second process is ready, in which nothing is compiled yet but what the pack brings."""
    told = json.dumps([name, options.size, precision, options.layers, options.tune_seconds])
    command = [sys.executable, "-m", "accelerate_tts.cli.bench.command", told]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603 - ourselves
    if done.returncode:
        raise AccelerateTTSError(f"the second process failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pyplot() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingExtraError("--plot draws with matplotlib; pip install matplotlib") from error
    return figure


def _draw(found: Sequence[Measured], path: Path) -> None:
    figure = _pyplot().Figure(figsize=(8, 1 + 0.5 * len(found)))
    axes = figure.add_subplot()
    names = [f"{one.system}, {one.precision}" for one in found]
    axes.barh(names, [one.whole.ratio for one in found], color="#4477aa")
    axes.axvline(1.0, color="black", linewidth=0.8)
    for number, one in enumerate(found):
        axes.plot(SYSTEMS[one.system].promised, [number, number], color="#ee6677", linewidth=3)
    axes.set_xlabel("times as fast as untouched, whole call (red: what was promised)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":  # the second process of `_warm_start`
    _name, _size, _precision, _layers, _seconds = json.loads(sys.argv[1])
    _say(str(tuned(_name, _size, _precision, _layers, _seconds)[1].seconds))
