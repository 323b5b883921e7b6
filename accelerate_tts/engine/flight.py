"""One tuning at a time in a process, without ever waiting for oneself."""

from __future__ import annotations

import sys
from contextvars import ContextVar

from accelerate_tts.locks import rlock

__all__ = ["Flight"]


class Flight:
    """One tuning at a time: it measures, and two at once would spoil each other's figures.

    A warm-up may run the user's coroutines on an event loop of another thread, or code that loads something else.
    Whoever would then wait for a tuning that waits for him is told so instead.
    """

    def __init__(self) -> None:
        self._lock = rlock()
        self._inside: ContextVar[bool] = ContextVar("accelerate_tts_tuning", default=False)
        self._loop: object = None
        self._outer: list[tuple[bool, object]] = []  # what `end` goes back to: a warm-up may load something else

    def begin(self, loop: object) -> bool:
        """Wait for the turn; False where waiting would never end."""
        if not self._lock.acquire(blocking=False):
            if self._inside.get() or (self._loop is not None and self._loop is _running_loop()):
                return False
            self._lock.acquire()
        self._outer.append((self._inside.get(), self._loop))
        if loop is not None:
            self._loop = loop
        self._inside.set(True)
        return True

    def end(self) -> None:
        """Give the turn up."""
        inside, self._loop = self._outer.pop()
        self._inside.set(inside)
        self._lock.release()


def _running_loop() -> object:
    asyncio = sys.modules.get("asyncio.events")
    return None if asyncio is None else asyncio._get_running_loop()
