"""Lock for one tuning at a time in a process, without self-deadlock."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from accelerate_tts.locks import rlock
from accelerate_tts.runtime.concurrency.queue import running_loop


class TuningLock:
    """Allows one tuning at a time, since two would disturb each other's timings.

    A warm-up may run the user's coroutines on another thread's event loop, or code that loads another object. A load
    that would wait for a tuning that waits for it is refused.
    """

    def __init__(self) -> None:
        self._lock = rlock()
        self._inside: ContextVar[bool] = ContextVar("accelerate_tts_tuning", default=False)
        self._loop: object = None
        self._owner: int | None = None

    @contextmanager
    def held(self, loop: object) -> Generator[bool, None, None]:
        """Hold the lock while open, after waiting for it; yield False if the wait would never end.

        Args:
            loop: The event loop that the caller's warm-up runs coroutines on, if any.
        """
        inside = self._inside.get()
        # Held by another thread. Of two loads at the same moment, each may wait for the other's end alone.
        is_away = self._owner not in {None, threading.get_ident()}
        if is_away and (inside or (self._loop is not None and self._loop is running_loop())):
            yield False
            return
        with self._lock, self._entered(loop, inside=inside):  # between an `acquire()` and the next line comes Ctrl-C
            yield True

    @contextmanager
    def _entered(self, loop: object, *, inside: bool) -> Generator[None, None, None]:
        outer = self._loop, self._owner  # a warm-up may load something else
        try:
            self._owner = threading.get_ident()
            if loop is not None:
                self._loop = loop
            self._inside.set(True)
            yield
        finally:
            self._loop, self._owner = outer
            self._inside.set(inside)
