"""Gate of a tuned object: switches its changes only while no other call is inside.

A model that is switched during a call computes one layer with the changes and the next one without, perhaps in another
precision. The call would raise, or return what neither model returns. Calls therefore register while they are inside, a
switch waits until no other call is, and new calls wait for the switch. No wait is longer than `PATIENCE`. No caller
waits for calls that enclose it, nor for coroutines of an event loop that it blocks. If the switch is not possible, the
first attempt's output is returned as it is.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

from accelerate_tts.errors import described
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.concurrency.queue import is_closed, running_loop

PATIENCE = 10.0
"""Seconds that a switch waits for running calls, and that new calls wait for the switch."""
_POLL = 0.005  # seconds between two checks of a coroutine, which must not wait on a lock
_OPEN = 10.0  # multiple of the patience for which calls do not wait after a wait has timed out

WITHIN: ContextVar[tuple[Step, ...]] = ContextVar("accelerate_tts_within", default=())
"""The guarded calls that enclose the running code, outermost first."""


class BusyError(Exception):
    """There was no moment without other calls. Never leaves the guard."""


class Step:
    """A guarded call while it may be inside the model.

    Args:
        call: The call, whose end is known by its collection.

    Attributes:
        loop: The event loop that its coroutine runs on; `None` for any other call.
        obstacle: Reason why the call must not be repeated, or "".
        differs: Reason why another attempt would not give the same, or "".
    """

    __slots__ = ("__weakref__", "_call", "differs", "loop", "obstacle", "process")

    def __init__(self, call: object = None) -> None:
        self._call = None if call is None else weakref.ref(call)
        self.loop: object = None
        self.obstacle = self.differs = ""
        self.process = os.getpid()

    @property
    def is_over(self) -> bool:
        """True if the call has ended, or never goes on, since its event loop was closed."""
        return (self._call is not None and self._call() is None) or is_closed(self.loop)

    @contextmanager
    def entered(self) -> Generator[None, None, None]:
        """Scope of the code of the call."""
        before = WITHIN.get()
        # A task inherits the calls that enclose its start, and may outlive them.
        try:
            WITHIN.set((*(step for step in before if not step.is_over), self))
            yield
        finally:
            WITHIN.set(before)  # no token: a generator may be closed in another context


class Hold:
    """Keeps an object untouched until it is released or collected.

    Args:
        gate: The object's gate.
        pin: Keeps the loaded weights in memory.
    """

    __slots__ = ("__weakref__", "_gate", "pin", "process")

    def __init__(self, gate: Gate, pin: object) -> None:
        self._gate = gate
        self.pin = pin
        self.process = os.getpid()

    def release(self) -> None:
        """Let the changes be switched on again as soon as no other hold is left. Idempotent."""
        self._gate.release(self)
        self.pin = None

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Gate:
    """Switches one object.

    Args:
        on: Switches its changes on. Idempotent.
        off: Switches them off. Idempotent.
        patience: See `PATIENCE`.
        tell: Called with the reason if the changes stay off.
    """

    def __init__(
        self, on: Callable[[], None], off: Callable[[], None], patience: float, tell: Callable[[str], None]
    ) -> None:
        self._on, self._off = on, off
        self._patience = patience
        self._tell = tell
        # Reentrant: the collector may close an abandoned stream on a thread that holds the lock. It is taken by itself:
        # an interrupt may arrive in the methods of a condition, which are Python's, and leave it locked.
        self._lock = rlock()
        self._changed = threading.Condition(self._lock)
        # Weak: a call that an interruption kept from unregistering disappears with its object.
        self._inside: weakref.WeakSet[Step] = weakref.WeakSet()
        self._holds: weakref.WeakSet[Hold] = weakref.WeakSet()
        self._pins: list[object] = []
        self._waiting: set[object] = set()
        self._is_off = False  # True also while a switch may have been interrupted half-way
        self._leaving = self.over = False
        self._shut_from = 0.0
        self._told = False

    # --- calls ----------------------------------------------------------------------------------------------------

    def enter(self, step: Step, *, wait: bool) -> None:
        """Register a call; wait first while a switch is pending, unless the wait could not end."""
        with self._lock:
            self._settle()
            while wait and self._is_shut() and not self._in_vain():
                self._changed.wait(self._shut_from + self._patience - time.monotonic())
                self._settle()
            self._inside.add(step)

    async def ready(self) -> None:
        """Wait as a coroutine while a switch is pending."""
        if not self._is_shut() or running_loop() is None:
            return
        import asyncio

        while self._is_shut():
            await asyncio.sleep(_POLL)
            with self._lock:
                self._settle()

    def leave(self, step: Step) -> None:
        """Unregister a call. Idempotent."""
        with self._lock:
            self._inside.discard(step)
            self._settle()
            self._changed.notify_all()

    def _is_shut(self) -> bool:
        draining = self._is_off and not self._held()
        if self.over or not (self._waiting or draining or self._leaving):
            return False
        late = time.monotonic() - self._shut_from
        if late < 0.0 or any(step in self._inside for step in WITHIN.get()):
            return False
        if late < self._patience:
            return True
        self._shut_from += late + _OPEN * self._patience
        if draining and not self._told:
            self._told = True
            self._tell("calls overlap without a gap in which it could be switched, so it serves as it was loaded")
        return False

    # --- switching ------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Number of holds on the object now."""
        with self._lock:
            return self._held()

    def hold(self, pin: object, *, force: bool = False) -> Hold:
        """Wait for a gap between calls, and switch the object off.

        Args:
            pin: Keeps the loaded weights in memory.
            force: Switch after `patience` even if other calls are running.

        Raises:
            BusyError: There was no gap, and `force` is off.
        """
        hold = Hold(self, pin)
        with self._lock:
            self._await_gap(force=force)
            self._take(hold)
        return hold

    async def hold_later(self, pin: object) -> Hold:
        """Like `hold`, as a coroutine."""
        hold = Hold(self, pin)
        end = time.monotonic() + self._patience
        with self._waits():
            while True:
                with self._lock:
                    if self._is_free():
                        self._take(hold)
                        return hold
                if time.monotonic() >= end or running_loop() is None:
                    self._busy()
                import asyncio

                await asyncio.sleep(_POLL)

    def release(self, hold: Hold) -> None:
        """See `Hold.release`."""
        with self._lock:
            if hold in self._holds:
                self._pins.append(hold.pin)  # calls that began meanwhile need the loaded weights, too
                self._holds.discard(hold)
                self._shut_from = time.monotonic()
            self._settle()
            self._changed.notify_all()

    def end(self, *, wait: bool) -> None:
        """Switch the object off for good.

        Args:
            wait: Wait for a gap, at most `patience`, then switch in any case; otherwise switch at the next gap.
        """
        with self._lock:
            self._leaving = True
            self._shut_from = time.monotonic()
            if wait:
                self._await_gap(force=True)
                self._finish()
            else:
                self._settle()

    def _held(self) -> int:
        process = os.getpid()  # holds of other threads from before a fork are never released
        return sum(hold.process == process for hold in self._holds)

    def _is_free(self) -> bool:
        return self.over or self._is_off or not self._others()

    def _others(self) -> list[Step]:
        """Return the calls that are inside and do not enclose the running code."""
        own, process = WITHIN.get(), os.getpid()
        inside = (step for step in self._inside if step.process == process and step not in own)
        return [step for step in inside if not is_closed(step.loop)]

    def _in_vain(self) -> bool:
        """Check for another call that cannot continue while this thread waits, since it runs on this thread's loop."""
        loop = running_loop()
        return loop is not None and any(step.loop is loop for step in self._others())

    def _await_gap(self, *, force: bool) -> None:
        end = time.monotonic() + self._patience
        with self._waits():
            while not self._is_free():
                left = end - time.monotonic()
                if left > 0.0 and not self._in_vain():
                    self._changed.wait(left)
                elif force:
                    return
                else:
                    self._busy()

    def _busy(self) -> NoReturn:
        raise BusyError("other calls of the object were under way")

    @contextmanager
    def _waits(self) -> Generator[None, None, None]:
        """Scope in which a caller waits for a gap."""
        waiter = object()
        try:
            with self._lock:
                if not self._waiting:
                    self._shut_from = time.monotonic()
                self._waiting.add(waiter)
                self._changed.notify_all()
            yield
        finally:
            self._waiting.discard(waiter)  # alone: an interruption in what follows costs a wake-up
            with self._lock:
                self._changed.notify_all()

    def _take(self, hold: Hold) -> None:
        try:
            if not (self._is_off or self.over):
                self._is_off = True  # set first: after an interruption, `_settle` switches on again
                self._off()
            self._holds.add(hold)
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Perform a pending switch if no other call is inside."""
        if self.over or not (self._is_off or self._leaving):
            return
        if self._leaving and (self._is_off or not self._others()):
            self._finish()
        elif self._is_off and not self._held() and not self._others():
            try:
                self._on()
            except Exception as error:  # no memory, for example: off is correct, half on would not be
                self._finish()
                self._tell(f"it could not be put in force again: {described(error)}")
            else:
                self._is_off = self._told = False
                self._pins.clear()

    def _finish(self) -> None:
        self._is_off = True
        self._off()
        self.over = True
