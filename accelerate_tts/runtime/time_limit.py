"""A time limit on work that somebody else wrote: `within(seconds, "the warm-up", work)`, or `with time_limit(...)`.

Python cannot kill a thread. What it can do is raise an exception in one, between two of its bytecodes. So a loop in
Python is interrupted, also one that sleeps a little in each round; a single call into native code (a kernel, a long
`sleep`, a lock, a read from a socket) is interrupted when it returns and, if it never does, never; unless somebody ends
what it waits for (`free`). That it was not is then said in an event. Whoever waits in here for another thread or an
event loop should wait no longer than `remaining()`.

The exception must not arrive after the work has returned. Who ends a limit waits while one is being raised; one that
was raised at the last moment and has not arrived yet is waited for and dropped; and none is raised while the limit
itself is at work, which the thread's stack tells.
"""

from __future__ import annotations

import heapq
import itertools
import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate_tts.errors import TimeLimitError
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType, TracebackType

__all__ = ["remaining", "shield", "time_limit", "within"]

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

_AGAIN = 1.0  # seconds; code that swallows every exception gets another one
_SOON = 0.002  # seconds for which a limit that just begins or ends is left alone
_ARRIVES = 100_000  # rounds of an empty loop, of which it takes one or two
_DEAF = 10.0  # seconds after which it is said that the work does not hear


class _Interruption(BaseException):
    """What is raised in the thread. Each limit has a class of its own, by which it knows its own again."""

    limit: weakref.ref[time_limit]

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        limit = self.limit()
        if limit is not None:
            limit.heard, limit.due = True, False
            limit.raised = weakref.ref(self)


class time_limit:  # noqa: N801 - used like a function, as contextlib's own are
    """Interrupt the body of a `with` that takes too long. Limits may nest; each holds for its own thread.

    `within` is safer by a hair: an interruption that comes in the very bytecode at which the body ends leaves a `with`
    as what it is, a BaseException, and `within` as TimeLimitError.

    Args:
        seconds: How long the body may take; `None` is no limit; 0 or less has passed already.
        what: What takes so long, for messages.
        free: Called at each interruption, in the watchdog's thread: ends what the body waits for in native code, at
            once, and says what that was, for the error; "" if there was nothing. It must not raise.

    Raises:
        TimeLimitError: The body was interrupted. What else it raises is passed on.
    """

    def __init__(self, seconds: float | None, what: str, free: Callable[[], str] | None = None) -> None:
        self.seconds = seconds
        self.what = what
        self.free = free
        self.freed = ""
        self.thread = 0
        self.end = 0.0
        self.over = True
        self.fired = self.due = self.heard = self.told = self.raising = False
        self.raised: weakref.ref[BaseException] | None = None
        self.kind: type[_Interruption] = _Interruption
        self._outer: weakref.ref[time_limit] | None = None

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        self.thread = threading.get_ident()
        self.kind = type("_Interruption", (_Interruption,), {"limit": weakref.ref(self)})
        self._outer = getattr(_here, "limit", None)
        _here.limit = weakref.ref(self)
        self.end = time.monotonic() + self.seconds
        self.over = False
        _watch(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, self.kind):
            raise self.error() from None

    def close(self) -> None:
        """End the limit: nothing is raised any more, nor arrives. Harmless a second time."""
        if self.over:
            return
        # Without the lock: whatever arrives in here would leave it held, and every later limit deaf.
        try:
            self.over = True
            while self.raising:  # `look` may have found it open just before
                time.sleep(0)
            if self.due:
                self._let_arrive()
        finally:
            _here.limit = self._outer

    def _let_arrive(self) -> None:
        # It is on its way, and comes between two of these. To take it back would be simpler, but CPython (3.10, 3.11)
        # then goes on looking for it at every bytecode, and a traced function (a debugger, coverage) never begins.
        with suppress(self.kind):
            for _ in range(_ARRIVES):  # an end, since that of a limit around this one may have taken its place
                pass

    def error(self) -> TimeLimitError:
        """What the caller is told."""
        return TimeLimitError(f"{self.what} did not return within {self.seconds:g} s and was interrupted", self.freed)

    def left(self) -> float:
        """Seconds until it or a limit around it has passed; may be negative."""
        outer = None if self._outer is None else self._outer()
        left = self.end - time.monotonic()
        return left if outer is None else min(left, outer.left())

    def look(self, now: float) -> float | None:
        """Interrupt the work if it is time to. Returns when to look again, or `None`. Under the lock."""
        if now < self.end:
            return None if self.over else self.end
        self.raising = True  # first: who ends it from here on waits
        try:
            if self.over:
                return None
            frame = sys._current_frames().get(self.thread)
            if frame is None:  # the thread is gone
                return None
            if _is_shielded(frame):
                return now + _SOON
            if self.raised is None or self.raised() is None:  # else the last one is still on its way out
                self.fired = self.due = True
                _raise_in(self.thread, self.kind)
        finally:
            self.raising = False
        if self.free is not None:  # after the exception is on its way: it is the first thing to happen there
            self.freed = self.free() or self.freed
        return now + _AGAIN

    def is_deaf(self, now: float) -> bool:
        """Whether it is to be said, once, that nothing was heard of the interruption. Under the lock."""
        self.told, before = self.told or (self.fired and not self.heard and now > self.end + _DEAF), self.told
        return self.told and not before and not self.over


def within(seconds: float | None, what: str, work: Callable[[], T], free: Callable[[], str] | None = None) -> T:
    """What `work` returns, unless that takes too long.

    Args:
        seconds: How long it may take; `None` is no limit.
        what: What it is, for messages.
        work: The work.
        free: See `time_limit`.

    Raises:
        TimeLimitError: It was interrupted.
    """
    limit = time_limit(seconds, what, free)
    try:
        with limit:
            return work()
    except _Interruption as interruption:  # it came just when the body had ended
        limit.close()
        if not isinstance(interruption, limit.kind):
            raise  # of a limit around this one
        raise limit.error() from None


def remaining() -> float | None:
    """Seconds that the limits around the caller in its thread leave it, at least 0; `None` if there are none."""
    inner = getattr(_here, "limit", None)
    limit = None if inner is None else inner()
    return None if limit is None or limit.over else max(0.0, limit.left())


def shield(function: F) -> F:
    """Have no interruption come while this function runs: what it leaves half done would be broken for good."""
    _shielded.add(function.__code__)
    return function


def _is_shielded(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _shielded:
            return True
        frame = frame.f_back
    return False


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


_here = threading.local()
_shielded: set[CodeType] = set()
for _function in (
    time_limit.__enter__,
    time_limit.__exit__,
    time_limit.close,
    time_limit._let_arrive,
    _Interruption.__init__,
):
    shield(_function)

# Limits by when to look at them. An ended one stays until its time comes: to wake the watchdog costs more.
_bell = threading.Condition()
_limits: list[tuple[float, int, weakref.ref[time_limit]]] = []
_numbers = itertools.count()
_most = 256
_watchdog: threading.Thread | None = None


def _watch(limit: time_limit) -> None:
    global _watchdog, _limits, _most  # noqa: PLW0603 - one watchdog for the process, under its lock
    with _bell:
        if len(_limits) >= _most:
            _limits = [entry for entry in _limits if (known := entry[2]()) is not None and not known.over]
            heapq.heapify(_limits)
            _most = max(256, 2 * len(_limits))
        heapq.heappush(_limits, (limit.end, next(_numbers), weakref.ref(limit)))
        if _watchdog is None or not _watchdog.is_alive():
            _watchdog = threading.Thread(target=_keep_watch, name="accelerate_tts-watchdog", daemon=True)
            _watchdog.start()
        elif _limits[0][2]() is limit:
            _bell.notify()


def _keep_watch() -> None:
    while True:
        with _bell:
            deaf = _looked(time.monotonic())
            if not deaf:
                _bell.wait(max(0.0, _limits[0][0] - time.monotonic()) if _limits else None)
        for what in deaf:
            emit(
                NotApplied(
                    f"the time limit of {what}",
                    "it has passed, but the work is in native code, which cannot be interrupted; it goes on until that"
                    " returns",
                )
            )


def _looked(now: float) -> list[str]:
    """Look at all limits whose time has come; returns what does not hear."""
    deaf: list[str] = []
    while _limits and _limits[0][0] <= now:
        limit = heapq.heappop(_limits)[2]()
        again = None if limit is None else limit.look(now)
        if limit is not None and again is not None:
            if limit.is_deaf(now):
                deaf.append(limit.what)
            heapq.heappush(_limits, (again, next(_numbers), weakref.ref(limit)))
    return deaf


def _after_fork() -> None:
    # The watchdog is not in the child; its lock may have been held by it.
    global _bell, _watchdog
    _bell, _watchdog = threading.Condition(), None
    _limits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
