"""Time limits on foreign code: `within(seconds, "the warm-up", work)`, or `with time_limit(...)`.

Python cannot kill a thread, but it can raise an exception in one between two bytecodes. A loop in Python is therefore
interrupted, also one with short sleeps. A single call into native code (a kernel, a long `sleep`, a lock, a read from a
socket) is interrupted only when it returns, unless `free` ends its wait. An event reports work that does not react.
Code under a limit that waits for another thread or an event loop should wait no longer than `remaining()`.

The exception must not arrive after the work has returned. The end of a limit waits while an exception is being raised.
An exception that was raised at the last moment is awaited and dropped. None is raised while the limit's own functions
run, which is detected from the thread's stack.
"""

from __future__ import annotations

import heapq
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import CodeType, FrameType, TracebackType
from typing import Any, TypeVar

from accelerate_tts.errors import TimeLimitError
from accelerate_tts.events import NotApplied, emit

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

_SOON = 0.002  # seconds until the next check of a limit that just begins or ends
_ARRIVES = 100_000  # maximum rounds of the empty loop in which an exception arrives; one or two suffice


@dataclass(frozen=True)
class WatchdogPolicy:
    """Rules of the watchdog. Tests give others with `watchdog_policy`.

    Attributes:
        clock: Returns seconds.
        again: Seconds between two interruptions of code that swallows exceptions.
        unresponsive: Seconds after which an event reports that the work does not react.
    """

    clock: Callable[[], float] = time.monotonic
    again: float = 1.0
    unresponsive: float = 10.0


_policies: list[WatchdogPolicy] = [WatchdogPolicy()]


@contextmanager
def watchdog_policy(policy: WatchdogPolicy) -> Generator[None, None, None]:
    """Set the policy of all limits of this process while open. They are checked at once, by its clock."""
    own = replace(policy)  # scopes may overlap, and several may be given the same
    try:
        _policies.append(own)
        _check_all()
        yield
    finally:
        try:
            _policies[:] = [each for each in _policies if each is not own]
            _check_all()
        except BaseException:  # Ctrl-C in it
            _policies[:] = [each for each in _policies if each is not own]
            _check_all()
            raise


class Interruption(BaseException):
    """The exception that is raised in the thread. Each limit has a subclass of its own."""

    limit: weakref.ref[time_limit]

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        limit = self.limit()
        if limit is not None:
            limit.arrived, limit.due = True, False
            limit.raised = weakref.ref(self)


class time_limit:  # noqa: N801 - used like a function, as contextlib's own are
    """Interrupts the body of a `with` that takes too long. Limits may nest; each applies to its own thread.

    `within` is slightly safer: an interruption in the last bytecode of the body leaves a `with` as a bare
    BaseException, but `within` as TimeLimitError.

    Args:
        seconds: Time limit in seconds. `None` is no limit, and 0 or less has passed already.
        what: Name of the work, for messages.
        free: Called at each interruption, on the watchdog's thread. It ends the body's wait in native code at once, and
            returns a description of that for the error, or "". It must not raise.

    Raises:
        TimeLimitError: The body was interrupted. Its other exceptions are passed on.
    """

    def __init__(self, seconds: float | None, what: str, free: Callable[[], str] | None = None) -> None:
        self.seconds = seconds
        self.what = what
        self.free = free
        self.freed = ""
        self.thread = 0
        self.end = 0.0
        self.over = True
        self.fired = self.due = self.arrived = self.reported = self.raising = False
        self.raised: weakref.ref[BaseException] | None = None
        self.kind: type[Interruption] = Interruption
        self._outer: weakref.ref[time_limit] | None = None

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        self.thread = threading.get_ident()
        self.kind = type("Interruption", (Interruption,), {"limit": weakref.ref(self)})
        self._outer = getattr(_here, "limit", None)
        _here.limit = weakref.ref(self)
        self.end = _policies[-1].clock() + self.seconds
        self.over = False
        _watch(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, self.kind):
            raise self.error() from None

    def close(self) -> None:
        """End the limit. No exception is raised or arrives afterwards. Idempotent."""
        if self.over:
            return
        # Without the lock: an exception that arrives here would leave it locked, and block every later limit.
        try:
            self.over = True
            while self.raising:  # `look` may have read `over` just before
                time.sleep(0)
            if self.due:
                self._let_arrive()
        finally:
            _here.limit = self._outer

    def _let_arrive(self) -> None:
        # The exception is pending and arrives between two of these bytecodes. Cancelling it would be simpler, but
        # CPython (3.10, 3.11) then checks for it at every bytecode, and a traced function (a debugger, coverage) hangs.
        with suppress(self.kind):
            for _ in range(_ARRIVES):  # bounded, since an outer limit's exception may have replaced it
                pass

    def error(self) -> TimeLimitError:
        """Return the error for the caller."""
        return TimeLimitError(f"{self.what} did not return within {self.seconds:g} s and was interrupted", self.freed)

    def left(self) -> float:
        """Return the seconds until this limit or an outer one passes; may be negative."""
        outer = None if self._outer is None else self._outer()
        left = self.end - _policies[-1].clock()
        return left if outer is None else min(left, outer.left())

    def look(self, now: float) -> float | None:
        """Interrupt the work if the limit has passed. The caller holds the lock.

        Returns:
            Time of the next check, or `None` if the limit has ended.
        """
        if now < self.end:
            return None if self.over else self.end
        self.raising = True  # set first: `close` waits from here on
        try:
            if self.over:
                return None
            frame = sys._current_frames().get(self.thread)
            if frame is None:  # the thread is gone
                return None
            if _is_shielded(frame):
                return now + _SOON
            if self.raised is None or self.raised() is None:  # otherwise the last one is still propagating
                self.fired = self.due = True
                raise_in(self.thread, self.kind)
        finally:
            self.raising = False
        if self.free is not None:  # last, so that the exception is pending when the wait ends
            self.freed = self.free() or self.freed
        return now + _policies[-1].again

    def is_unresponsive(self, now: float) -> bool:
        """Check once that the work does not react to the interruption. The caller holds the lock."""
        unresponsive = self.fired and not self.arrived and now > self.end + _policies[-1].unresponsive
        self.reported, before = self.reported or unresponsive, self.reported
        return self.reported and not before and not self.over


def within(seconds: float | None, what: str, work: Callable[[], T], free: Callable[[], str] | None = None) -> T:
    """Return the result of `work`, or interrupt it when it takes too long.

    Args:
        seconds: Time limit in seconds; `None` is no limit.
        what: Name of the work, for messages.
        work: The work.
        free: See `time_limit`.

    Raises:
        TimeLimitError: The work was interrupted.
    """
    limit = time_limit(seconds, what, free)
    try:
        with limit:
            return work()
    except Interruption as interruption:  # it arrived just as the body ended
        limit.close()
        if not isinstance(interruption, limit.kind):
            raise  # an outer limit's exception
        raise limit.error() from None


def remaining() -> float | None:
    """Return the seconds left of the caller's limits on this thread, at least 0; `None` without a limit."""
    inner = getattr(_here, "limit", None)
    limit = None if inner is None else inner()
    return None if limit is None or limit.over else max(0.0, limit.left())


def shield(function: F) -> F:
    """Forbid interruptions while this function runs, since an interrupted run would leave broken state."""
    _shielded.add(function.__code__)
    return function


def _is_shielded(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _shielded:
            return True
        frame = frame.f_back
    return False


def raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raise an exception in a thread between two bytecodes, as soon as it runs Python code."""
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


_here = threading.local()
_shielded: set[CodeType] = set()
for _function in (
    time_limit.__enter__,
    time_limit.__exit__,
    time_limit.close,
    time_limit._let_arrive,
    Interruption.__init__,
):
    shield(_function)

# Limits by the time of their next check. An ended limit stays until then, since waking the watchdog costs more.
_changed = threading.Condition()
_limits: list[tuple[float, int, weakref.ref[time_limit]]] = []
_numbers = itertools.count()
_most = 256
_watchdog: threading.Thread | None = None


def _watch(limit: time_limit) -> None:
    global _watchdog, _limits, _most  # noqa: PLW0603 - one watchdog for the process, under its lock
    with _changed:
        if len(_limits) >= _most:
            _limits = [entry for entry in _limits if (known := entry[2]()) is not None and not known.over]
            heapq.heapify(_limits)
            _most = max(256, 2 * len(_limits))
        heapq.heappush(_limits, (limit.end, next(_numbers), weakref.ref(limit)))
        if _watchdog is None or not _watchdog.is_alive():
            _watchdog = threading.Thread(target=_keep_watch, name="accelerate_tts-watchdog", daemon=True)
            _watchdog.start()
        elif _limits[0][2]() is limit:
            _changed.notify()


def _check_all() -> None:
    with _changed:
        _changed.notify()


def known_limits() -> int:
    """Return the number of limits that are remembered, ended ones among them."""
    with _changed:
        return len(_limits)


def _keep_watch() -> None:
    while True:
        with _changed:
            clock = _policies[-1].clock
            unresponsive = _looked(clock())
            if not unresponsive:
                _changed.wait(max(0.0, _limits[0][0] - clock()) if _limits else None)
        for what in unresponsive:
            emit(
                NotApplied(
                    f"the time limit of {what}",
                    "it has passed, but the work is in native code, which cannot be interrupted; it goes on until that"
                    " returns",
                )
            )


def _looked(now: float) -> list[str]:
    """Check all limits that are due; return the names of work that does not react."""
    unresponsive: list[str] = []
    while _limits and _limits[0][0] <= now:
        limit = heapq.heappop(_limits)[2]()
        again = None if limit is None else limit.look(now)
        if limit is not None and again is not None:
            if limit.is_unresponsive(now):
                unresponsive.append(limit.what)
            heapq.heappush(_limits, (again, next(_numbers), weakref.ref(limit)))
    return unresponsive


def _after_fork() -> None:
    # The watchdog does not exist in the child, and may have held the lock.
    global _changed, _watchdog
    _changed, _watchdog = threading.Condition(), None
    _limits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
