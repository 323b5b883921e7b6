"""Drivers of generators, coroutines and async generators, with hooks around their steps.

All decorators drive suspended bodies through this module. Each `send`, `throw` and `close` of the caller reaches the
body inside the contexts of the hooks, and each item reaches the caller outside of them. A retry replaces the body while
it is driven.
"""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

SKIPPED: Any = object()
"""Returned by `Hooks.got` for an item that the caller does not get."""


class Again:
    """Returned by a hook to replace the body.

    Args:
        body: The new body, not yet started.
    """

    __slots__ = ("body",)

    def __init__(self, body: Any) -> None:
        self.body = body


class Hooks:
    """Hooks around the steps of a body. The defaults do nothing.

    A *step* lasts from one item to the next. In a generator it is one `send`; in an async generator it may be several,
    with suspensions in between.
    """

    __slots__ = ()

    def scope(self) -> AbstractContextManager[Any]:
        """Return the context around each `send`, `throw` and `close`. It is never open across a suspension."""
        return nullcontext()

    def span(self, *, closing: bool) -> AbstractContextManager[Any]:
        """Return the context around each step. It stays open across the suspensions of an async generator's step.

        Args:
            closing: True while the body is closed, perhaps by the garbage collector. The context must not wait then.
        """
        del closing
        return nullcontext()

    async def ready(self) -> None:
        """Wait before a step of an async generator."""

    def got(self, item: Any) -> Any:
        """Return the item for the caller, or `SKIPPED`, or `Again`."""
        return item

    async def got_later(self, item: Any) -> Any:
        """Like `got`, for an async generator."""
        return self.got(item)

    def ended(self) -> Again | None:
        """Called when the body has ended. Return `Again` to continue with another body."""
        return None

    async def ended_later(self) -> Again | None:
        """Like `ended`, for an async generator."""
        return self.ended()

    def failed(self, error: Exception) -> Again | None:
        """Called when the body has raised. Return `Again` to continue with another body instead of raising."""
        del error
        return None

    async def failed_later(self, error: Exception) -> Again | None:
        """Like `failed`, for an async generator."""
        return self.failed(error)

    def sent(self) -> None:
        """Called when the caller has sent a value or thrown an exception into the body."""

    def closed(self) -> None:
        """Called once at the end, for any kind of end."""


class Scoped(Hooks):
    """Hooks that enter one context around each `send`, `throw` and `close`.

    Args:
        enter: Returns the context.
    """

    __slots__ = ("scope",)

    def __init__(self, enter: Any) -> None:
        self.scope = enter  # type: ignore[method-assign]  # the slot replaces the method, which saves a call


def drive(body: Any, hooks: Hooks) -> Generator[Any, Any, Any]:  # noqa: C901, PLR0912 - a loop with all its exits
    """Drive a body with `send`, `throw` and `close` to its end, and return its result.

    Args:
        body: A generator, a coroutine, or the iterator of an `__await__`.
        hooks: Hooks around its steps.
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
                    elif closing and (type(body) not in _CLOSED_BY_THROWING or _has_ended(body)):
                        return body.close()
                    else:
                        # Closes a generator, which may yield once more or (Python 3.13) return a value.
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
                value = error = None  # across a suspension they would keep tensors alive, also through a traceback
            item = hooks.got(item)
            if item is SKIPPED:
                continue
            if type(item) is Again:
                with suppress(Exception):  # errors of the abandoned body are irrelevant
                    body.close()
                body = item.body
                del item
                continue
            try:
                value = yield item
            except BaseException as thrown:  # exceptions of the caller are passed to the body
                error = thrown
            finally:
                del item
            if value is not None or error is not None:
                hooks.sent()
    finally:
        hooks.closed()


_CLOSED_BY_THROWING = (types.GeneratorType, types.CoroutineType)


def _has_ended(body: Any) -> bool:
    """Check for a coroutine that has ended, into which nothing can be thrown.

    The collector closes the coroutines of an abandoned task in any order, the inner ones perhaps first.
    """
    return type(body) is types.CoroutineType and body.cr_frame is None


class _Stepping:
    """Makes `drive` awaitable."""

    __slots__ = ("body", "hooks")

    def __init__(self, body: Any, hooks: Hooks) -> None:
        self.body = body
        self.hooks = hooks

    def __await__(self) -> Generator[Any, Any, Any]:
        return drive(self.body, self.hooks)


class Owning(_Stepping):
    """Makes a coroutine awaitable inside its hooks, and closes it when collected.

    A task that is cancelled before its first step never runs its coroutine. Closing the body avoids the warning that it
    "was never awaited". Closing a body that has ended does nothing.
    """

    __slots__ = ()

    def close(self) -> None:
        """Close the body. In a cycle the collector finalises a body that was never awaited first, with a warning."""
        self.body.close()

    def __del__(self) -> None:
        self.body.close()


async def drive_async(  # noqa: C901, PLR0912, PLR0915 - a loop with all its exits
    body: Any, hooks: Hooks
) -> AsyncGenerator[Any, Any]:
    """Drive an async generator to its end."""
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
            except BaseException as thrown:  # exceptions of the caller are passed to the body
                error = thrown
            finally:
                del item
            if value is not None or error is not None:
                hooks.sent()
    finally:
        # Also after an early break, a cancellation and the event loop's shutdown: the body's `finally` runs now.
        try:
            with hooks.span(closing=True):
                await _Stepping(body.aclose(), Scoped(hooks.scope))
        finally:
            hooks.closed()


def _first_step(body: Any) -> Awaitable[Any]:
    """Make the first step of an async generator without registering it with the event loop."""
    # An async generator registers with its event loop at its first step, and the loop closes it at shutdown. Here the
    # driver is registered, and it closes the body inside the hooks' contexts. The loop must not close the body outside
    # of them. The collector must not either: in a cycle it finalises the body first, without a finaliser it would
    # close it at once, and an await in its clean-up would be an error.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, lambda _body: None)
    try:
        return body.asend(None)  # type: ignore[no-any-return]
    finally:
        sys.set_asyncgen_hooks(*hooks)


class HasBody:
    """Base class of an object with methods of its own around a generator, which can be driven inside of it."""

    _body: Any

    def drive_body(self, driver: Callable[[Any], Any]) -> None:
        """Replace the generator by its driver. Called before its first step."""
        self._body = driver(self._body)

    def succeeded_by(self, other: object) -> None:
        """Note that the driver runs another attempt's body from now on, which the methods must reach, too."""


def named_like(body: Any, driver: Any) -> Any:
    """Give the driver the names of its body, and return it."""
    for name in ("__name__", "__qualname__"):  # shown in warnings and in a task's repr
        if hasattr(body, name):
            setattr(driver, name, getattr(body, name))
    return driver
