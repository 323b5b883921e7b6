"""Drive a generator, a coroutine or an async generator step by step, with hooks around its steps.

Everything that a decorator does with a suspended body is done here, once: each `send`, `throw` and `close` that the
caller makes reaches the body, inside whatever the hooks enter, and what the body gives reaches the caller outside of
it. A body may be exchanged for another one while it is driven, which is how a call is made again.
"""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

__all__ = ["SKIPPED", "Again", "Hooks", "Owning", "Scoped", "drive", "drive_async", "named_like"]

SKIPPED: Any = object()
"""What `Hooks.got` returns of an item that the caller is not to have."""


class Again:
    """What a hook returns to have another body driven in place of the present one.

    Args:
        body: The other body, at its beginning.
    """

    __slots__ = ("body",)

    def __init__(self, body: Any) -> None:
        self.body = body


class Hooks:
    """What happens around the steps of a body. These defaults do nothing.

    A *step* lasts from one item to the next: of a generator it is one `send`, of an async generator it may be many,
    with suspensions in between.
    """

    __slots__ = ()

    def scope(self) -> AbstractContextManager[Any]:
        """What is entered around each `send`, `throw` and `close`; never open across a suspension."""
        return nullcontext()

    def span(self, *, closing: bool) -> AbstractContextManager[Any]:
        """What is entered around each step; open across the suspensions of an async generator's.

        Args:
            closing: The body is being closed, perhaps by the garbage collector: nothing may be waited for.
        """
        del closing
        return nullcontext()

    async def ready(self) -> None:
        """Await whatever an async generator's step has to wait for."""

    def got(self, item: Any) -> Any:
        """The item as the caller is to have it, or `SKIPPED`, or `Again`."""
        return item

    async def got_later(self, item: Any) -> Any:
        """`got`, of an async generator."""
        return self.got(item)

    def ended(self) -> Again | None:
        """Called when the body has ended; `Again` to go on with another."""
        return None

    async def ended_later(self) -> Again | None:
        """`ended`, of an async generator."""
        return self.ended()

    def failed(self, error: Exception) -> Again | None:
        """Called when the body has raised; `Again` to go on with another in place of raising it."""
        del error
        return None

    async def failed_later(self, error: Exception) -> Again | None:
        """`failed`, of an async generator."""
        return self.failed(error)

    def sent(self) -> None:
        """Called when the caller has sent a value or thrown an exception into the body."""

    def closed(self) -> None:
        """Called once, at the very end, however it came."""


class Scoped(Hooks):
    """Hooks that enter one context around each `send`, `throw` and `close`.

    Args:
        enter: Makes the context.
    """

    __slots__ = ("scope",)

    def __init__(self, enter: Any) -> None:
        self.scope = enter  # type: ignore[method-assign]  # the slot is this method, without another call in between


def drive(body: Any, hooks: Hooks) -> Generator[Any, Any, Any]:  # noqa: C901, PLR0912 - a loop with all its exits
    """Drive a body that has `send`, `throw` and `close` to its end, and return what it returns.

    Args:
        body: A generator, a coroutine, or what an `__await__` returns.
        hooks: What happens around its steps.
    """
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            closing = isinstance(error, GeneratorExit)
            try:
                with hooks.span(closing=closing), hooks.scope():
                    if error is None:
                        item = body.send(value)
                    elif closing and type(body) not in _CLOSED_BY_THROWING:
                        return body.close()
                    else:
                        # Of a generator, closing is this: it may yield once more, or (Python 3.13) return something.
                        item = body.throw(error)
            except StopIteration as stop:
                again = None if closing else hooks.ended()
                if again is None:
                    return stop.value
                body = again.body
                continue
            except Exception as raised:
                again = None if closing else hooks.failed(raised)
                if again is None:
                    raise
                body = again.body
                continue
            finally:
                value = error = None  # kept across a suspension, they would keep tensors (in a traceback) alive
            item = hooks.got(item)
            if item is SKIPPED:
                continue
            if type(item) is Again:
                with suppress(Exception):  # what the given-up body does at its end is nobody's business any more
                    body.close()
                body = item.body
                del item
                continue
            try:
                value = yield item
            except BaseException as thrown:  # whatever the caller throws belongs to the body
                error = thrown
            finally:
                del item
            if value is not None or error is not None:
                hooks.sent()
    finally:
        hooks.closed()


_CLOSED_BY_THROWING = (types.GeneratorType, types.CoroutineType)


class _Stepping:
    """Makes `drive` awaitable."""

    __slots__ = ("body", "hooks")

    def __init__(self, body: Any, hooks: Hooks) -> None:
        self.body = body
        self.hooks = hooks

    def __await__(self) -> Generator[Any, Any, Any]:
        return drive(self.body, self.hooks)


class Owning(_Stepping):
    """Makes a coroutine awaitable inside its hooks, and closes it with itself.

    A task that is cancelled before its first step never runs its coroutine; without this the body would complain
    that it "was never awaited". On a body that has ended, closing does nothing.
    """

    __slots__ = ()

    def __del__(self) -> None:
        self.body.close()


async def drive_async(  # noqa: C901, PLR0912, PLR0915 - a loop with all its exits
    body: Any, hooks: Hooks
) -> AsyncGenerator[Any, Any]:
    """Drive an async generator to its end.

    Args:
        body: The async generator.
        hooks: What happens around its steps.
    """
    value: Any = None
    error: BaseException | None = None
    first = True
    try:
        while True:
            closing = isinstance(error, GeneratorExit)
            if not closing:
                await hooks.ready()
            try:
                with hooks.span(closing=closing):
                    step = _first_step(body) if first else body.asend(value) if error is None else body.athrow(error)
                    value = error = None
                    first = False
                    try:
                        item = await _Stepping(step, Scoped(hooks.scope))
                    finally:
                        del step
            except StopAsyncIteration:
                again = None if closing else await hooks.ended_later()
                if again is None:
                    return
                body, first = again.body, True
                continue
            except Exception as raised:
                again = None if closing else await hooks.failed_later(raised)
                if again is None:
                    raise
                body, first = again.body, True
                continue
            item = await hooks.got_later(item)
            if item is SKIPPED:
                continue
            if type(item) is Again:
                with suppress(Exception):  # see `drive`
                    await body.aclose()
                body, first = item.body, True
                del item
                continue
            try:
                value = yield item
            except BaseException as thrown:  # whatever the caller throws belongs to the body
                error = thrown
            finally:
                del item
            if value is not None or error is not None:
                hooks.sent()
    finally:
        # Also on an early break, a cancellation and the event loop's shutdown: the body's own `finally` runs now.
        try:
            with hooks.span(closing=True):
                await _Stepping(body.aclose(), Scoped(hooks.scope))
        finally:
            hooks.closed()


def _first_step(body: Any) -> Awaitable[Any]:
    """The first step of an async generator that another one drives, which is the one that its event loop knows."""
    # An async generator registers with its event loop at its first step, to be closed at the loop's shutdown. The
    # driver is registered and closes the body, in the mode; the body itself must not be closed beside it, outside. Nor
    # by the collector, which finalises both when it finds them in a cycle, the body first: without a finalizer it would
    # be closed on the spot, and an await in its clean-up would be an error.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _left_to_the_driver)
    try:
        return body.asend(None)  # type: ignore[no-any-return]
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _left_to_the_driver(_body: Any) -> None:
    pass


def named_like(body: Any, driver: Any) -> Any:
    """`driver`, named like the body that it drives."""
    for name in ("__name__", "__qualname__"):  # what a warning or a task's repr shows
        if hasattr(body, name):
            setattr(driver, name, getattr(body, name))
    return driver
