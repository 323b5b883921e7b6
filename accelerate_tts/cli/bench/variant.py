"""Measurement of one variant of one system in a process of its own, so that peak memory is separate, too.

`python -m accelerate_tts.cli.bench.variant REQUEST ANSWER` takes the request as a JSON text, and writes the answer to a
JSON file. `accelerate_tts.cli.bench.processes` starts it.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate_tts.cli.bench import measure
from accelerate_tts.cli.bench.naive import naive
from accelerate_tts.cli.lines import say
from accelerate_tts.events import Event, Trying, add_hook

if TYPE_CHECKING:
    from accelerate_tts.cli.bench.systems import Size
    from accelerate_tts.settings import Precision

NO_ANSWER = "no answer"
"""The only key of an answer that reports a failure; its value is the reason."""


Variant = Literal["eager", "naive", "tuned", "restored"]


@dataclass(frozen=True)
class Request:
    """A measurement request.

    Attributes:
        variant: "eager" is the system as loaded, "naive" the same under `torch.compile`. "tuned" is the tuned system,
            and "restored" the same from the warm pack that a "tuned" process has written.
        system: Name of the system.
        size: "full" or "tiny".
        precision: Precision level of tuning.
        layers: Number of layers; `None` for all.
        pairs: Number of pairs of calls.
        tune_seconds: Time budget of tuning.
        tokens: Speech tokens of one call; `None` for the usual length.
    """

    variant: Variant
    system: str
    size: Size
    precision: Precision
    layers: int | None
    pairs: int
    tune_seconds: float
    tokens: int | None


def answer(request: Request) -> dict[str, Any]:
    """Measure a variant.

    Returns:
        The fields of `Measured` for "tuned", those of `Naive` for "naive", otherwise seconds and peak.

    Raises:
        MissingExtraError: The system's package is not installed.
        AccelerateTTSError: Nothing was tuned, or nothing compiled.
    """
    name, size, layers = request.system, request.size, request.layers
    length = measure.length_of(name, size, request.tokens)
    if request.variant == "tuned":
        return asdict(
            measure.bench(
                name, size, request.precision, layers=layers, pairs=request.pairs, seconds=request.tune_seconds,
                tokens=request.tokens,
            )
        )  # fmt: skip
    if request.variant == "restored":
        built, receipt, _ = measure.tuned(name, size, request.precision, layers, request.tune_seconds)
        measure.spoken(built, length)
        return {"seconds": receipt.seconds, "peak": measure.peak_bytes(measure.device_type())}
    built = measure.ordinary(name, size, layers)
    if request.variant == "naive":
        found = naive(built, length, request.pairs)
        return asdict(replace(found, peak=measure.peak_bytes(measure.device_type())))
    start = time.perf_counter()
    measure.spoken(built, measure.warm_up(name, size))
    cold = time.perf_counter() - start
    measure.spoken(built, length)
    return {"seconds": cold, "peak": measure.peak_bytes(measure.device_type())}


def finite(value: Any) -> Any:
    """Replace infinities and NaN by `None`, since JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say_what_is_tried(event: Event) -> None:
    if isinstance(event, Trying):
        say(f"  {event.what}: trying {event.stage}")


def main() -> None:
    """Run the process."""
    warnings.simplefilter("ignore")
    add_hook(_say_what_is_tried)
    told, written = sys.argv[1:]
    try:
        content = answer(Request(**json.loads(told)))
    except Exception as error:  # the bench reports any error in place of a figure
        said = str(error).strip().splitlines() or [""]  # the first line; the compiler's errors have many
        content = {NO_ANSWER: f"{type(error).__name__}: {said[0]}"}
    Path(written).write_text(json.dumps(content), "utf-8")  # Python's JSON, which may contain Infinity


if __name__ == "__main__":
    main()
