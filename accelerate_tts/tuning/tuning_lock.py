"""One tuning at a time in a process, without ever waiting for oneself."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate_tts.locks import rlock

__all__ = ["TuningLock"]


class TuningLock:
    """Lock of tunings. One runs at a time: it measures, and two at once would spoil each other's figures.

    A warm-up may run the user's coroutines on an event loop of another thread, or code that loads something else.
    A load that would then wait for the tuning that waits for it is refused.
    """

    def __init__(self) -> None:
        self._lock = rlock()
        self._inside: ContextVar[bool] = ContextVar("accelerate_tts_tuning", default=False)
        self._loop: object = None

    @contextmanager
    def held(self, loop: object) -> Generator[bool, None, None]:
        """Wait for the lock, and hold it while open; yields False, without it, where waiting would never end.

        Args:
            loop: The event loop that the caller's warm-up runs coroutines on, if any.
        """
        held = False
        inside = self._inside.get()
        outer = self._loop  # a warm-up may load something else
        try:
            held = self._lock.acquire(blocking=False)
            if not held and (inside or (self._loop is not None and self._loop is _running_loop())):
                yield False
                return
            if not held:
                held = self._lock.acquire()
            outer = self._loop
            if loop is not None:
                self._loop = loop
            self._inside.set(True)
            yield True
        finally:  # also of what comes between two lines of the above
            self._inside.set(inside)
            if held:
                self._loop = outer
                self._lock.release()


def _running_loop() -> object:
    asyncio = sys.modules.get("asyncio.events")
    return None if asyncio is None else asyncio._get_running_loop()
