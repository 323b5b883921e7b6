"""OpenTelemetry spans, if they are wanted. Without opentelemetry a span does nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


class Spans:
    """Spans of the service.

    Args:
        where: "" for none, "console", "otlp" for the exporter that the `OTEL_EXPORTER_OTLP_*` variables describe, or a
            tracer provider of your own.

    Raises:
        ImportError: The packages that this needs are not installed.
    """

    def __init__(self, where: Any = "") -> None:
        self._tracer: Any = None
        if where:
            self._tracer = (_provider(where) if isinstance(where, str) else where).get_tracer("service")

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Generator[Callable[[str, Any], None], None, None]:
        """Run a block in a span. Yields a function that sets an attribute."""
        if self._tracer is None:
            yield lambda _name, _value: None
            return
        span = self._tracer.start_span(name, attributes=attributes)
        try:
            yield span.set_attribute
        except BaseException as error:
            span.record_exception(error)
            raise
        finally:
            span.end()


def _provider(where: str) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    if where == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter: Any = OTLPSpanExporter()
    else:
        exporter = ConsoleSpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
