"""Queue of the calls of one object, and the permits that were granted.

A permit may be released by a finaliser on a thread that is already inside this code. Updates therefore go to an inbox,
and whichever thread gets the lock processes them; no thread waits for the lock.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.runtime import time_limit

WAIT_LIMIT = 30.0
"""Seconds that a thread waits for a permit whose last item it took itself."""


class Slot:
    """A granted permit, shared by one call and its nested calls."""

    __slots__ = ("holders", "limit", "loop", "made_on", "taker")

    def __init__(self, first: Ticket) -> None:
        self.limit = first.limit
        self.holders = {first}
        self.loop = first.loop
        self.made_on: object = None  # the event loop on which a stream was called for, wherever it is stepped
        # The task or thread that took the last item of a stream; `None` while a step runs.
        self.taker: weakref.ref[Any] | None = None


class Ticket:
    """A queue's record of a call. It does not refer to the call itself, which may be collected meanwhile."""

    __slots__ = ("blocked", "chain", "ended", "is_task", "limit", "loop", "refused", "slot", "wake", "who")

    def __init__(self, limit: int, *, blocking: bool) -> None:
        self.limit = limit
        self.chain = INSIDE.get()
        self.who, self.is_task = running_code()
        self.loop = running_loop()
        self.blocked = self.loop if blocking else None
        self.slot: Slot | None = None
        self.refused = self.ended = False
        self.wake: Callable[[], object] = bool


INSIDE: ContextVar[tuple[Slot, ...]] = ContextVar("accelerate_tts_permits", default=())
"""The permits of the calls that enclose the running code."""


class WaitQueue:
    """Queue of the calls of one object.

    Attributes:
        wait_limit: See `WAIT_LIMIT`.
    """

    def __init__(self) -> None:
        self.wait_limit = WAIT_LIMIT
        self._inbox: deque[Ticket] = deque()
        self._at_work = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._slots: list[Slot] = []

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a permit."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """True if no permit is held, no call waits, and no update is left to process."""
        return not (self._slots or self._queue or self._inbox)

    def look_again(self, ticket: Ticket) -> None:
        """Grant a waiting ticket its permit if the holder's event loop was closed meanwhile."""
        if any(is_closed(slot.loop) for slot in list(self._slots)):
            self.post(ticket)

    @time_limit.shield  # after an interruption in here, the inbox might never be processed again
    def post(self, ticket: Ticket) -> None:
        """Post a ticket that is new, or whose call has ended. Callable from any thread at any time; never waits."""
        self._inbox.append(ticket)
        # A thread that posts while another one holds the lock relies on that one to check the inbox again at its end.
        while self._inbox and self._at_work.acquire(blocking=False):
            try:
                # Permits of calls that can never go on. They would be released once the calls are collected.
                self._slots = [slot for slot in self._slots if not is_closed(slot.loop)]
                while self._inbox:
                    self._look_at(self._inbox[0])  # idempotent, since an interrupted one is repeated
                    self._inbox.popleft()
                self._admit()
            finally:
                self._at_work.release()

    def _look_at(self, ticket: Ticket) -> None:
        if ticket.ended:
            with suppress(ValueError):
                self._queue.remove(ticket)
            if ticket.slot is not None:
                ticket.slot.holders.discard(ticket)
                if not ticket.slot.holders and ticket.slot in self._slots:
                    self._slots.remove(ticket.slot)
        elif ticket.slot is None and ticket not in self._queue:
            outer = next((slot for slot in ticket.chain if slot in self._slots), None)
            if outer is not None:
                outer.holders.add(ticket)
                ticket.slot = outer
                _woken(ticket)
            elif self.is_in_vain(ticket, took=ticket.is_task):
                ticket.refused = True
                _woken(ticket)
            else:
                self._queue.append(ticket)

    def is_in_vain(self, ticket: Ticket, *, took: bool) -> bool:
        """Check that a call waits for a loop that it blocks or, with `took`, for a stream whose last item it took.

        A stream that was called for on a loop, and is stepped in threads, is mostly taken on by that loop.

        A task has one caller. A thread of a pool may have taken an item for another one, who goes on elsewhere: its
        call is given up only if it has waited for a while, and nobody has taken the next item.
        """
        blocked = ticket.blocked

        def is_stuck(slot: Slot) -> bool:
            if blocked is not None and slot.loop is blocked:
                return True
            if not took or slot.taker is None:
                return False
            return slot.taker == ticket.who or (blocked is not None and slot.made_on is blocked)

        stuck = [slot for slot in list(self._slots) if is_stuck(slot)]
        if blocked is not None and any(other.loop is blocked for other in list(self._queue) if other is not ticket):
            return True
        return bool(stuck) and len(stuck) >= min(ticket.limit, *(slot.limit for slot in stuck))

    def _admit(self) -> None:
        # Later calls do not overtake the first in the queue, which might otherwise wait forever.
        while self._queue and len(self._slots) < min([self._queue[0].limit, *(slot.limit for slot in self._slots)]):
            ticket = self._queue[0]
            ticket.slot = Slot(ticket)
            self._slots.append(ticket.slot)
            self._queue.popleft()
            if not _woken(ticket):
                self._slots.remove(ticket.slot)


def _woken(ticket: Ticket) -> bool:
    try:
        ticket.wake()
    except RuntimeError:  # its event loop was closed while it waited
        return False
    return True


def running_loop() -> object:
    """Return the asyncio event loop that runs on this thread, or `None`. Does not import asyncio."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()


def is_closed(loop: Any) -> bool:
    """Check for an event loop that was closed. What was suspended on it never goes on."""
    return loop is not None and bool(loop.is_closed())


def running_code() -> tuple[weakref.ref[Any], bool]:
    """Return the running task and True or, outside of event loops, the thread and False."""
    loop = running_loop()
    task = None if loop is None else sys.modules["asyncio"].current_task(loop)
    return (weakref.ref(threading.current_thread()), False) if task is None else (weakref.ref(task), True)


known_queues = IdentityMap[WaitQueue]()
"""Queues of objects."""


def queue_of(instance: object, function: object) -> WaitQueue:
    """Return the queue of an object, or of a function that is not a method.

    An object without support for weak references uses the queue of its class.
    """
    item = function if instance is None else instance
    try:
        return known_queues.setdefault(item, WaitQueue)
    except TypeError:
        return queue_of(type(item), function)


if hasattr(os, "register_at_fork"):
    # The threads that held permits do not exist in the child, so these would never be released.
    os.register_at_fork(after_in_child=known_queues.clear)
