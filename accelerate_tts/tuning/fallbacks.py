"""Fallbacks during a comparison: if a change falls back, the untouched part is compared with itself."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate_tts.events import Event, FellBack, hooked

_noting: ContextVar[tuple[list[FellBack], ...]] = ContextVar("accelerate_tts_noting", default=())


@contextmanager
def fallbacks() -> Generator[list[FellBack], None, None]:
    """Collect `FellBack` events while open, since a change that fell back computes the untouched part's outputs.

    Only events of this context and its copies count: another object may fall back in service meanwhile.
    """
    found: list[FellBack] = []
    outer = _noting.get()
    here = (*outer, found)

    def note(event: Event) -> None:
        if isinstance(event, FellBack) and any(noted is found for noted in _noting.get()):
            found.append(event)

    with hooked(note):
        try:
            _noting.set(here)
            yield found
        finally:
            _noting.set(outer)
