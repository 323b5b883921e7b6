"""Completion of calls: await the result, or collect the items of a stream."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import TimeLimitError
from accelerate_tts.events import Lasting, NotApplied
from accelerate_tts.runtime import time_limit

if TYPE_CHECKING:
    import asyncio


_GRACE = 2.0  # seconds beyond the limit in which another thread can still report its own time-out


def complete(result: Any, loop: asyncio.AbstractEventLoop | None = None, events: Lasting | None = None) -> Any:
    """Complete a call: await a coroutine, or collect the items of a stream into a list.

    Args:
        result: The call's result. A plain value is returned as it is.
        loop: A running event loop of another thread to await on. Without one, a new loop is used.
        events: Sends what holds for all calls of a warm-up.

    Raises:
        TimeLimitError: The time limits of the calling thread passed first.
    """
    if isinstance(result, AsyncIterator):
        result = _collect(result)
    if isinstance(result, Awaitable):
        return _wait_for(result, loop, events or Lasting())
    return list(result) if isinstance(result, Iterator) else result


def is_stream(result: Any) -> bool:
    """Tell if a call's result comes in pieces."""
    return isinstance(result, (Iterator, AsyncIterator))


def begin(stream: Any, loop: asyncio.AbstractEventLoop | None = None, events: Lasting | None = None) -> None:
    """Take the first piece of a stream, and leave it, as a caller may.

    Args:
        stream: A result for which `is_stream` is true.
        loop: See `complete`.
        events: See `complete`.
    """
    if isinstance(stream, AsyncIterator):
        _wait_for(_begin(stream), loop, events or Lasting())
        return
    try:
        next(stream, None)
    finally:
        if hasattr(stream, "close"):
            stream.close()


async def _begin(stream: Any) -> None:
    try:
        await stream.__anext__()
    except StopAsyncIteration:
        return
    finally:
        if hasattr(stream, "aclose"):
            await stream.aclose()


async def _collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


async def _await(awaitable: Awaitable[Any], left: float | None) -> Any:
    """Await with a timeout of the waiting thread's remaining time, since its limits cannot interrupt a wait."""
    if left is None:
        return await awaitable
    import asyncio

    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=left - min(1.0, left / 4))  # leaves time for a cancelled task's clean-up
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeLimitError("what it awaits did not come in time, and was cancelled")
    return await task


async def _alone(awaitable: Awaitable[Any], left: float | None, events: Lasting) -> Any:
    """Await on an event loop that is made for this. A task that the call leaves behind ends with the loop."""
    import asyncio

    result = await _await(awaitable, left)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        what = min(str(getattr(task.get_coro(), "__qualname__", task.get_name())) for task in others)
        events.emit(
            NotApplied(
                f"waiting for {what}",
                "it is a task that a warm-up call has left on an event loop of its own, which ends with the call; let"
                " the load function be async, so that its warm-up runs on the service's loop",
            )
        )
    return result


def _wait_for(awaitable: Awaitable[Any], loop: asyncio.AbstractEventLoop | None, events: Lasting) -> Any:
    import asyncio

    left = time_limit.remaining()
    if loop is not None:
        future = asyncio.run_coroutine_threadsafe(_await(awaitable, left), loop)
        return _result(future, left)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_alone(awaitable, left, events))
    # A synchronous load inside a running loop blocks that loop, so the coroutine runs on another one. The context is
    # copied, since it may hold the permit of an enclosing call.
    outcome: Future[Any] = Future()

    def alone() -> Any:
        return asyncio.run(_alone(awaitable, left, events))

    def work() -> None:
        try:
            outcome.set_result(time_limit.within(left, "a warm-up call", alone))
        except BaseException as error:  # raised on the waiting thread
            outcome.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="accelerate_tts-warmup").start()
    return _result(outcome, left)


def _result(future: Future[Any], left: float | None) -> Any:
    """Return the result of another thread, which normally keeps the time limit itself."""
    if left is None:
        return future.result()
    wait((future,), left + _GRACE)
    if not future.done():
        future.cancel()
        raise TimeLimitError("the thread that it waits for did not answer in time")
    return future.result()
