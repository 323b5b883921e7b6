"""Limiter of simultaneous calls of one object: `@inference(concurrency=N)`.

The permits belong to the object, and its limited methods share them, since they share the model. A call waits, first
come first served, until fewer calls run than its own limit and the limits of the running calls allow. A coroutine waits
without blocking its event loop. A stream holds its permit from its first item until it ends, is closed or collected.
Nested calls share the permit of the outer call.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ConcurrencyError, SettingsError, shown
from accelerate_tts.events import Lasting, NotApplied
from accelerate_tts.runtime.concurrency.queue import INSIDE, Ticket, WaitQueue, running_code, running_loop
from accelerate_tts.runtime.drive import Owning, Scoped, drive, drive_async, named_like

if TYPE_CHECKING:
    import asyncio

_MOST = 2**31 - 1
_AT_ONCE = 0.1  # seconds
_KINDS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE | inspect.CO_GENERATOR


def check_concurrency(concurrency: object) -> None:
    """Raise `SettingsError` unless `concurrency` is `None` or a whole number of at least 1."""
    if concurrency is None:
        return
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or not 1 <= concurrency <= _MOST:
        raise SettingsError(
            f"concurrency={shown(concurrency)} must be None (no limit) or a whole number of at least 1:"
            " how many calls of one object may run at once"
        )


class Permit:
    """Permit of one call: a context manager, plain and async, that waits for the permit and releases it.

    Attributes:
        name: Name of the called function.

    Raises:
        ConcurrencyError: The permit can never be granted, since its holder waits for this call; raised on entry.
    """

    def __init__(self, wait_queue: WaitQueue, limit: int, name: str) -> None:
        self._wait_queue = wait_queue
        self._limit = limit
        self.name = name
        self._made_on = running_loop()
        self._ticket: Ticket | None = None
        self._is_over = False

    def __enter__(self) -> None:
        if self._held():
            return
        ticket, self._is_over = Ticket(self._limit, blocking=True), False
        self._ticket = ticket
        lock = self._posted(ticket)
        try:
            while not lock.acquire(timeout=self._wait_queue.wait_limit):
                self._wait_queue.look_again(ticket)
                ticket.refused = ticket.slot is None and self._wait_queue.is_in_vain(ticket, took=True)
                if ticket.refused:
                    break
        except BaseException:  # Ctrl-C
            self.end()
            raise
        self._refuse()

    def _posted(self, ticket: Ticket) -> threading.Lock:
        """Post a ticket, and return a lock that is released once it was granted or refused."""
        # A bare lock: the wake-up may run in the garbage collector, inside any Python code.
        lock = threading.Lock()
        lock.acquire()
        ticket.wake = lock.release
        self._wait_queue.post(ticket)
        return lock

    async def __aenter__(self) -> None:
        if self._held():
            return
        ticket, self._is_over = Ticket(self._limit, blocking=False), False
        self._ticket = ticket
        loop: Any = ticket.loop
        if loop is None:
            # A permit that is free is granted at once, also if another thread processes the ticket.
            if not self._posted(ticket).acquire(timeout=_AT_ONCE):
                self.end()
                raise ConcurrencyError(
                    f"{self.name} has to wait for a permit, and coroutines wait on an asyncio event loop only;"
                    " run it with asyncio, or leave concurrency= out"
                )
            return
        future: asyncio.Future[None] = loop.create_future()
        ticket.wake = functools.partial(loop.call_soon_threadsafe, _resolve, future)
        self._wait_queue.post(ticket)
        try:
            while ticket.slot is None and not ticket.refused:
                await _resolved(future, self._wait_queue.wait_limit)
                self._wait_queue.look_again(ticket)
        except BaseException:  # cancelled, in the queue or just after the permit was granted
            self.end()
            raise
        self._refuse()

    def _refuse(self) -> None:
        ticket = self._ticket
        if ticket is not None and ticket.refused:
            self.end()
            raise ConcurrencyError(
                f"{self.name} would wait for ever: concurrency={self._limit}, and the permit belongs to a call that"
                " cannot go on until this one returns. Close a stream before the next call; on an event loop call"
                " a plain function as `await asyncio.to_thread(function, ...)`"
            )

    def __exit__(self, *_: object) -> None:
        self.end()

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def __del__(self) -> None:
        self.end()

    def _held(self) -> bool:
        return self._ticket is not None and not self._ticket.ended

    @contextmanager
    def kept_if_shared(self) -> Generator[None, None, None]:
        """Hold the permit while open, and beyond for the returned stream if a nested stream shares it."""
        self.__enter__()
        try:
            yield
        except BaseException:
            self.end()
            raise
        slot = None if self._ticket is None else self._ticket.slot
        if slot is None or len(slot.holders) == 1:
            self.end()

    def end(self) -> None:
        """Release the permit, or leave the queue. Idempotent."""
        ticket = self._ticket
        if ticket is not None and not self._is_over:
            ticket.ended = True
            self._wait_queue.post(ticket)
            self._is_over = True  # last: after Ctrl-C in here, whoever ends it next posts it again

    @contextmanager
    def inside(self) -> Generator[None, None, None]:
        """Scope of each step of the call. Nested calls share the permit."""
        slot = None if self._ticket is None else self._ticket.slot
        if slot is None:
            yield
            return
        if slot in (outer := INSIDE.get()):  # a nested call: only who takes items from outside may forget a stream
            yield
            return
        try:
            INSIDE.set((*(one for one in outer if one.holders), slot))  # a task may outlive the calls around it
            slot.taker, slot.loop = None, running_loop()
            yield
        finally:
            INSIDE.set(outer)  # no token: Ctrl-C may have come before there is one
            slot.taker, slot.loop, slot.made_on = running_code()[0], running_loop(), self._made_on


class Beginning:
    """Knowledge of when the body of a function begins: in its call, or later, as that of a coroutine or a generator.

    A wrapper around such a function may return its coroutine or generator, or run it to its end. Its calls tell.

    Attributes:
        events: Sends what holds for all calls of the function.
    """

    def __init__(self) -> None:
        self._seen: bool | None = None
        self.events = Lasting()

    def is_later(self, function: Callable[..., Any]) -> bool:
        """Check that a call of the function will not run its body."""
        flags, is_wrapped = _flags(function)
        if not (flags & _KINDS and is_wrapped):
            return bool(flags & _KINDS)
        # At the first call on an event loop, which must not be blocked by a wait, a coroutine is more likely.
        return running_loop() is not None if self._seen is None else self._seen

    def note(self, result: Any) -> None:
        """Note what a call has returned."""
        self._seen = type(result) in _BODIES


_BODIES = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)


def call(
    wait_queue: WaitQueue, limit: int, function: Callable[..., Any], make: Callable[[], Any], beginning: Beginning
) -> Any:
    """Make a call under a permit. A returned coroutine or stream acquires its permit when it starts.

    Args:
        wait_queue: The object's queue.
        limit: Maximum simultaneous calls.
        function: The function that `make` calls.
        make: Makes the call. Coroutines, generators and async generators must be Python's own.
        beginning: What is known of the function.

    Raises:
        ConcurrencyError: The call would wait forever.
    """
    permit = Permit(wait_queue, limit, str(getattr(function, "__qualname__", type(function).__qualname__)))
    if beginning.is_later(function):
        result = make()
    else:
        with permit.kept_if_shared(), permit.inside():
            result = make()
    beginning.note(result)
    kind = type(result)
    if kind is types.CoroutineType:
        return named_like(result, _coroutine(permit, Owning(result, Scoped(permit.inside))))
    if kind is types.GeneratorType:
        return named_like(result, _generator(permit, result))
    if kind is types.AsyncGeneratorType:
        return named_like(result, drive_async(result, _UnderPermit(permit)))
    permit.end()
    # `inference_mode.call` drives all but these. Not isinstance: it asks the object, and a proxy may raise.
    if issubclass(kind, (Coroutine, Generator, AsyncGenerator)):
        what = "an object with methods of its own, and its steps take no permit; write `yield from`, or `await` it"
        event = NotApplied(f"concurrency={limit} of {permit.name}", f"it returned a {kind.__name__}, {what}")
        beginning.events.emit(event)
    return result


class _UnderPermit(Scoped):
    """Holds the permit from the first step of an async generator until it ends."""

    __slots__ = ("permit",)

    def __init__(self, permit: Permit) -> None:
        super().__init__(permit.inside)
        self.permit: Permit | None = permit

    async def ready(self) -> None:
        if self.permit is not None:
            await self.permit.__aenter__()

    def closed(self) -> None:
        if self.permit is not None:
            self.permit.end()
            self.permit = None


async def _coroutine(permit: Permit, body: Owning) -> Any:
    with closing(body):  # cancelled in the queue, it never begins
        async with permit:
            return await body


def _generator(permit: Permit, body: Any) -> Generator[Any, Any, Any]:
    with permit:
        return (yield from drive(body, Scoped(permit.inside)))


def _flags(function: Any) -> tuple[int, bool]:
    """Return the code flags of a function, and True if they are those of a function inside a wrapper.

    Partials and methods are looked through. A plain wrapper, by `functools.wraps` or wrapt, has the flags of the
    coroutine or generator function inside it, if there is one.
    """
    is_wrapped = False
    for _ in range(100):  # a chain of wrappers may be circular
        if isinstance(function, functools.partial):
            function = function.func
        elif type(function) in {types.MethodType, classmethod, staticmethod}:  # a proxy is not looked through here
            function = function.__func__
        elif (flags := _own_flags(function)) & _KINDS or not hasattr(function, "__wrapped__"):
            return flags, is_wrapped
        else:
            function, is_wrapped = function.__wrapped__, True
    return 0, False


def _own_flags(function: Any) -> int:
    # A proxy has the code of what it wraps, and runs other code.
    has_own = type(function) is types.FunctionType or not hasattr(function, "__wrapped__")
    called: Any = function if has_own and hasattr(function, "__code__") else getattr(type(function), "__call__", None)  # noqa: B004
    code = getattr(called, "__code__", None)
    return code.co_flags if isinstance(code, types.CodeType) else 0


async def _resolved(future: asyncio.Future[None], seconds: float) -> None:
    """Wait for a future, but not for longer than so many seconds."""
    import asyncio

    await asyncio.wait({future}, timeout=seconds)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
