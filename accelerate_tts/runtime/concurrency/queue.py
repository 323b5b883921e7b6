"""Queue of the calls of one object, and the permits that were granted.

A permit may be released by a finaliser on a thread that is already inside this code. Updates therefore go to an inbox,
and whichever thread gets the lock processes them; no thread waits for the lock.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from accelerate_tts.runtime import time_limit

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["INSIDE", "STREAMS", "Room", "Slot", "Ticket", "consumer", "room_of", "running_loop"]


class Slot:
    """A granted permit, shared by one call and its nested calls."""

    __slots__ = ("consumer", "holders", "limit", "loop")

    def __init__(self, first: Ticket) -> None:
        self.limit = first.limit
        self.holders = {first}
        self.loop = first.loop
        # The code that took the last item of the stream with this permit: task or thread, frame, and place.
        self.consumer: tuple[object, int, int] | None = None


class Ticket:
    """A queue's record of a call. It does not refer to the call itself, which may be collected meanwhile."""

    __slots__ = (
        "blocked",
        "chain",
        "ended",
        "frames",
        "limit",
        "loop",
        "refused",
        "seen",
        "slot",
        "streams",
        "wake",
        "who",
    )

    def __init__(self, limit: int, *, blocking: bool) -> None:
        self.limit = limit
        self.chain, self.streams = INSIDE.get(), STREAMS.get()
        self.who = _who()
        self.frames = _frames() if any(slot.holders for slot in self.streams) else {}
        self.loop = running_loop()
        self.blocked = self.loop if blocking else None
        self.slot: Slot | None = None
        self.refused = self.ended = self.seen = False
        self.wake: Callable[[], object] = bool

    def has_in_hand(self, slot: Slot) -> bool:
        """Check that the waiting code itself took the stream's last item, rather than other code on its thread."""
        if slot.consumer is None:
            return False
        who, frame, place = slot.consumer
        # The same place in the same frame is a loop, such as a worker's, that has begun other work.
        return who == self.who and self.frames.get(frame, place) != place


INSIDE: ContextVar[tuple[Slot, ...]] = ContextVar("accelerate_tts_turns", default=())
"""The permits of the calls that enclose the running code."""
STREAMS: ContextVar[tuple[Slot, ...]] = ContextVar("accelerate_tts_streams", default=())
"""The permits of streams from which the running code has taken items."""


class Room:
    """Queue of the calls of one object."""

    def __init__(self) -> None:
        self._inbox: deque[Ticket] = deque()
        self._at_work = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._slots: list[Slot] = []

    @time_limit.shield  # after an interruption in here, the inbox might never be processed again
    def post(self, ticket: Ticket) -> None:
        """Post a ticket that is new, or whose call has ended. Callable from any thread at any time; never waits."""
        self._inbox.append(ticket)
        # A thread that posts while another one holds the lock relies on that one to check the inbox again at its end.
        while self._inbox and self._at_work.acquire(blocking=False):
            try:
                while self._inbox:
                    self._look_at(self._inbox[0])  # idempotent, since an interrupted one is repeated
                    self._inbox.popleft()
                self._admit()
            finally:
                self._at_work.release()

    def settle(self, ticket: Ticket) -> None:
        """Wait until no thread processes this ticket, which takes microseconds."""
        while not ticket.seen or self._at_work.locked():
            time.sleep(0)

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
            elif self._is_in_vain(ticket):
                ticket.refused = True
                _woken(ticket)
            else:
                self._queue.append(ticket)
        ticket.seen = True

    def _is_in_vain(self, ticket: Ticket) -> bool:
        """Check that a call would wait forever: for a stream that its caller consumes, or for a loop that it blocks."""
        stuck = [
            slot
            for slot in self._slots
            if (slot in ticket.streams and ticket.has_in_hand(slot))
            or (ticket.blocked is not None and slot.loop is ticket.blocked)
        ]
        if ticket.blocked is not None and any(other.loop is ticket.blocked for other in self._queue):
            return True
        return bool(stuck) and len(stuck) >= min(ticket.limit, *(slot.limit for slot in stuck))

    def _bound(self, limit: int) -> int:
        return min([limit, *(slot.limit for slot in self._slots)])

    def _admit(self) -> None:
        # Later calls do not overtake the first in the queue, which might otherwise wait forever.
        while self._queue and len(self._slots) < self._bound(self._queue[0].limit):
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


def _who() -> object:
    """Return an identifier of the running task or, outside of event loops, of the thread."""
    loop = running_loop()
    task = None if loop is None else sys.modules["asyncio"].current_task(loop)
    return threading.get_ident() if task is None else ("task", id(task))


def _frames() -> dict[int, int]:
    """Return the bytecode offset of each frame on the stack, by frame id. Frames themselves would keep variables."""
    frame: FrameType | None = sys._getframe(1)
    found: dict[int, int] = {}
    while frame is not None:
        found[id(frame)] = frame.f_lasti
        frame = frame.f_back
    return found


def consumer() -> tuple[object, int, int] | None:
    """Return the code that takes an item: the first function outside this package that is not a generator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        ours = name == "contextlib" or name.partition(".")[0] == "accelerate_tts"
        if not ours and not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            return _who(), id(frame), frame.f_lasti
        frame = frame.f_back
    return None


# By the id of objects, held weakly.
_rooms: dict[int, tuple[weakref.ref[Any], Room]] = {}
_rooms_lock = threading.RLock()  # reentrant: making a weak reference may run the garbage collector, which calls `gone`


def room_of(instance: object, function: object) -> Room:
    """Return the queue of an object, or of a function that is not a method.

    An object without support for weak references uses the queue of its class.
    """
    item = function if instance is None else instance
    entry = _rooms.get(id(item))
    if entry is not None and entry[0]() is item:
        return entry[1]
    number = id(item)

    def gone(reference: object) -> None:
        with _rooms_lock:
            known = _rooms.get(number)
            if known is not None and known[0] is reference:
                del _rooms[number]

    try:
        reference = weakref.ref(item, gone)
    except TypeError:  # a class with slots: its instances share a queue
        return room_of(type(item), function)
    with _rooms_lock:
        entry = _rooms.get(number)
        if entry is None or entry[0]() is not item:
            entry = _rooms[number] = (reference, Room())
        return entry[1]


def _after_fork() -> None:
    # The threads that held permits do not exist in the child, so these would never be released.
    global _rooms_lock  # noqa: PLW0603 - such a thread may have held it
    _rooms_lock = threading.RLock()
    _rooms.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
