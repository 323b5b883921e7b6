"""Where the calls of one object wait for their turns, and who has one.

A turn may be given back anywhere, by the garbage collector too, in a thread that is just in here. So nobody waits for a
lock: what happened to a call is put into an inbox, and whoever finds nobody at work on it works it off.
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
    """A turn that was given: to one call, and to whatever this one calls."""

    __slots__ = ("consumer", "holders", "limit", "loop")

    def __init__(self, first: Ticket) -> None:
        self.limit = first.limit
        self.holders = {first}
        self.loop = first.loop
        # Who has the stream in hand that this is the turn of: whoever took its last item, and where.
        self.consumer: tuple[object, int, int] | None = None


class Ticket:
    """What a room knows of a call. It refers to nothing of the call itself, which may be collected meanwhile."""

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
        """Whether the code that took the stream's last item is the one that now waits, and not just its thread."""
        if slot.consumer is None:
            return False
        who, frame, place = slot.consumer
        # At the same place of the same function, a worker's loop perhaps, it is the next piece of other work.
        return who == self.who and self.frames.get(frame, place) != place


INSIDE: ContextVar[tuple[Slot, ...]] = ContextVar("accelerate_tts_turns", default=())
"""The turns of the calls that the present code is a part of."""
STREAMS: ContextVar[tuple[Slot, ...]] = ContextVar("accelerate_tts_streams", default=())
"""The turns of streams of which the present code has taken items."""


class Room:
    """Where the calls of one object wait."""

    def __init__(self) -> None:
        self._inbox: deque[Ticket] = deque()
        self._at_work = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._slots: list[Slot] = []

    @time_limit.shield  # interrupted in here, nobody would ever be at work on the inbox again
    def post(self, ticket: Ticket) -> None:
        """Have a look taken at a ticket: it is new, or its call has ended. Any thread, at any moment; never waits."""
        self._inbox.append(ticket)
        # Whoever put something in while another one was at work relies on that one to look once more at its end.
        while self._inbox and self._at_work.acquire(blocking=False):
            try:
                while self._inbox:
                    self._look_at(self._inbox[0])  # an interrupted look is taken again: it comes to the same
                    self._inbox.popleft()
                self._admit()
            finally:
                self._at_work.release()

    def settle(self, ticket: Ticket) -> None:
        """Return when nobody is at work on this ticket, which takes another thread microseconds."""
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
        """Whether it would wait for ever: for a stream that its caller has in hand, or for a loop that it blocks."""
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
        # The first in the queue is waited for even where a later one could go on: else it might wait for ever.
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
    """The asyncio event loop that runs in this thread, or `None`. Imports nothing to find out."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()


def _who() -> object:
    """Whoever runs: the task or, outside of event loops, the thread."""
    loop = running_loop()
    task = None if loop is None else sys.modules["asyncio"].current_task(loop)
    return threading.get_ident() if task is None else ("task", id(task))


def _frames() -> dict[int, int]:
    """The place in each function that is being called, by its frame. Kept, frames would keep their variables alive."""
    frame: FrameType | None = sys._getframe(1)
    found: dict[int, int] = {}
    while frame is not None:
        found[id(frame)] = frame.f_lasti
        frame = frame.f_back
    return found


def consumer() -> tuple[object, int, int] | None:
    """Whoever takes an item: the first function outside of us that is no generator, which only hands it on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        ours = name == "contextlib" or name.partition(".")[0] == "accelerate_tts"
        if not ours and not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
            return _who(), id(frame), frame.f_lasti
        frame = frame.f_back
    return None


# By the identity of objects, without keeping them.
_rooms: dict[int, tuple[weakref.ref[Any], Room]] = {}
_rooms_lock = threading.RLock()  # making a reference may run the garbage collector, and that `gone`


def room_of(instance: object, function: object) -> Room:
    """The room of an object, or of a function that is no method; of its class where no weak reference can be had."""
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
    except TypeError:  # a class with slots: its instances take turns together
        return room_of(type(item), function)
    with _rooms_lock:
        entry = _rooms.get(number)
        if entry is None or entry[0]() is not item:
            entry = _rooms[number] = (reference, Room())
        return entry[1]


def _after_fork() -> None:
    # The threads that held turns are not in the child, so nobody would ever give those back.
    global _rooms_lock  # noqa: PLW0603 - it may have been held by such a thread
    _rooms_lock = threading.RLock()
    _rooms.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
