"""Measurements of events, for any metrics system. This library depends on none of them.

A hook passes them on, here to prometheus-client::

    def hook(event):
        for item in measurements(event):
            metric = metrics[item.name].labels(**item.labels)
            metric.inc(item.value) if item.kind == "counter" else metric.set(item.value)

    remove = accelerate_tts.add_hook(hook)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from accelerate_tts.errors import printable
from accelerate_tts.events import DecodePasses, Event, FellBack, FirstAudio, Guarded, Recompiled, Restored, Tuned


@dataclass(frozen=True)
class Measurement:
    """A change of one metric.

    Attributes:
        name: Name of the metric, such as "accelerate_tts_fallbacks". A name has always the same labels and kind.
        value: Amount to add to a counter, or new value of a gauge.
        labels: Labels by name. Their values are printable, and their number is bounded by the loaded objects.
        kind: "counter" or "gauge".
    """

    name: str
    value: float
    labels: Mapping[str, str]
    kind: Literal["counter", "gauge"] = "counter"


def measurements(event: Event) -> tuple[Measurement, ...]:
    """Return the measurements of an event.

    Every event counts in `accelerate_tts_events` (labels `event` and `degraded`). Beside that,

    - `FellBack` counts in `accelerate_tts_fallbacks` (`what`, `stage`),
    - `Recompiled` in `accelerate_tts_recompilations` (`what`),
    - `Guarded` in `accelerate_tts_faulty_outputs` (`what`, `fault`),
    - `FirstAudio` sets the gauge `accelerate_tts_first_audio_seconds` (`what`),
    - `DecodePasses` counts in `accelerate_tts_decode_passes`, `accelerate_tts_decode_steps` and
      `accelerate_tts_decode_rows`, and sets the gauge `accelerate_tts_rows_per_pass` (`what`),
    - `Tuned` and `Restored` set the gauges `accelerate_tts_stages_kept` and `accelerate_tts_load_seconds` (`what`),
      and `Tuned` also `accelerate_tts_speedup`.
    """
    name = type(event).__name__
    found = [_counter("accelerate_tts_events", event=name, degraded=str(event.degraded).lower())]
    if isinstance(event, FellBack):
        found.append(_counter("accelerate_tts_fallbacks", what=event.what, stage=event.stage))
    elif isinstance(event, Recompiled):
        found.append(_counter("accelerate_tts_recompilations", what=event.what))
    elif isinstance(event, Guarded):
        found.append(_counter("accelerate_tts_faulty_outputs", what=event.what, fault=event.fault))
    elif isinstance(event, FirstAudio):
        found.append(_gauge("accelerate_tts_first_audio_seconds", event.seconds, event.what))
    elif isinstance(event, DecodePasses):
        found.append(_counter("accelerate_tts_decode_passes", event.passes, what=event.what))
        found.append(_counter("accelerate_tts_decode_steps", event.steps, what=event.what))
        found.append(_counter("accelerate_tts_decode_rows", event.rows, what=event.what))
        found.append(_gauge("accelerate_tts_rows_per_pass", event.rows / event.passes, event.what))
    elif isinstance(event, (Tuned, Restored)):
        found.append(_gauge("accelerate_tts_stages_kept", event.kept, event.what))
        found.append(_gauge("accelerate_tts_load_seconds", event.seconds, event.what))
        if isinstance(event, Tuned):
            found.append(_gauge("accelerate_tts_speedup", event.ratio, event.what))
    return tuple(found)


def _counter(name: str, amount: float = 1.0, **labels: str) -> Measurement:
    return Measurement(name, float(amount), {label: printable(value) for label, value in labels.items()})


def _gauge(name: str, value: float, what: str) -> Measurement:
    return Measurement(name, float(value), {"what": printable(what)}, "gauge")
