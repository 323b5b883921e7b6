"""Metrics for Prometheus: the service's own, and accelerate_tts' measurements from the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.wire import Message

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 60.0, 120.0)
_FACTORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Figures:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("tts_requests", "Answered requests", ["model", "outcome"], registry=registry)
        self.seconds = Histogram(
            "tts_request_seconds", "Seconds until the last byte", ["model"], registry=registry, buckets=_SECONDS
        )
        self.first_audio = Histogram(
            "tts_first_audio_seconds", "Seconds until the first bytes with sound were sent", ["model"],
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.factor = Histogram(
            "tts_real_time_factor", "Seconds of computing for a second of speech", ["model"],
            registry=registry, buckets=_FACTORS,
        )  # fmt: skip
        self.speech = Counter("tts_speech_seconds", "Seconds of speech that were made", ["model"], registry=registry)
        self.queued = Histogram(
            "tts_queue_seconds", "Seconds in the queue", ["model"], registry=registry, buckets=_SECONDS
        )
        self.lost = Counter("tts_worker_losses", "Workers that were replaced", ["reason"], registry=registry)
        self.retried = Counter("tts_requests_retried", "Requests made again on the next worker", registry=registry)
        self._measured: dict[str, Any] = {}

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each look."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def measured(self, measurements: list[Message]) -> None:
        """Take accelerate_tts' measurements of an event, as the worker has sent them."""
        for item in measurements:
            metric = self._measured.get(item["name"])
            if metric is None:
                make = Counter if item["kind"] == "counter" else Gauge
                metric = make(item["name"], "From accelerate_tts' events", list(item["labels"]), registry=self.registry)
                self._measured[item["name"]] = metric
            labelled = metric.labels(**item["labels"])
            if item["kind"] == "counter":
                labelled.inc(item["value"])
            else:
                labelled.set(item["value"])

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
