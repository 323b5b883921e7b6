"""Measurements of events: each event counts, and names keep their labels and kind."""

from __future__ import annotations

import pytest

from accelerate_tts import add_hook, measurements
from accelerate_tts.events import (
    BackedOff,
    DecodePasses,
    Event,
    FellBack,
    FirstAudio,
    Guarded,
    NotApplied,
    Prepared,
    Recompiled,
    Restored,
    Tuned,
    Warmed,
    emit,
)

SAMPLES: list[Event] = [
    Prepared("cpu", ()), Warmed("Voice", 1.0), Tuned("Voice", 3, 9, 1.5, 12.0), Restored("Voice", 3, 0.5),
    FellBack("Voice", "int8", "no memory"), Recompiled("Voice", 2, "(1, 80)"), BackedOff("embed", 8, 4),
    Guarded("Voice", "speak", "silent", "made again"), NotApplied("pack", "no folder"),
    FirstAudio("Voice", 0.25, 4800), DecodePasses("T3", 40, 90, 100), DecodePasses("T3", 10, 10, 20),
]  # fmt: skip


def test_a_hook_counts_every_event() -> None:
    seen: dict[str, float] = {}

    def hook(event: Event) -> None:
        for item in measurements(event):
            if item.kind == "counter":
                assert item.value > 0
                seen[item.name] = seen.get(item.name, 0) + item.value
            else:
                seen[f"{item.name} {item.labels['what']}"] = item.value

    remove = add_hook(hook)
    for event in SAMPLES:
        emit(event)
    remove()
    assert seen == {
        "accelerate_tts_events": len(SAMPLES), "accelerate_tts_fallbacks": 1, "accelerate_tts_recompilations": 1,
        "accelerate_tts_faulty_outputs": 1, "accelerate_tts_stages_kept Voice": 3,
        "accelerate_tts_load_seconds Voice": 0.5, "accelerate_tts_speedup Voice": 1.5,
        "accelerate_tts_first_audio_seconds Voice": 0.25, "accelerate_tts_decode_passes": 50,
        "accelerate_tts_decode_steps": 100, "accelerate_tts_decode_rows": 120, "accelerate_tts_rows_per_pass T3": 2.0,
    }  # fmt: skip


def test_a_name_has_always_the_same_labels_and_kind() -> None:
    shapes: dict[str, set[tuple[object, ...]]] = {}
    for event in SAMPLES:
        for item in measurements(event):
            shapes.setdefault(item.name, set()).add((item.kind, *item.labels))
    assert all(len(found) == 1 for found in shapes.values()), shapes


def test_degradations_are_told_from_others_and_foreign_names_are_made_printable() -> None:
    first, second = measurements(FellBack("Voice\x1b[31m\n", "int8", "why"))
    assert first.labels == {"event": "FellBack", "degraded": "true"}
    assert second.labels["what"] == "Voice\N{REPLACEMENT CHARACTER}[31m"
    assert measurements(Warmed("Voice", 1.0))[0].labels["degraded"] == "false"


def test_the_documented_hook_feeds_prometheus() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="pip install prometheus-client")
    registry = prometheus.CollectorRegistry()
    for item in measurements(SAMPLES[4]):
        prometheus.Counter(item.name, "", list(item.labels), registry=registry).labels(**item.labels).inc(item.value)
    assert registry.get_sample_value("accelerate_tts_fallbacks_total", {"what": "Voice", "stage": "int8"}) == 1
