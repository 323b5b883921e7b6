"""Run a call of any kind inside an inference mode, and nothing else inside it.

torch's modes belong to a thread. A coroutine or a generator gives its thread away at every suspension, so a mode that
is simply entered around its body is left on for whoever runs next, or off for the body itself. Here the mode is
entered for each *step* of the body (`send`, `throw`, `close`) and left before the suspension is passed on: bodies
always run inside it, callers never see it, in any order of interleaving, cancelling and closing.

One exception is not ours to mend: a suspended generator in a reference cycle is closed by the collector itself, before
the driver around it is asked, in whatever mode the collecting thread is.

What decides is the object that a call returned, not the function: a decorated `async def` may no longer look like one.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accelerate_tts.errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate_tts.settings import Mode

    Enter = Callable[[], AbstractContextManager[Any]]

__all__ = [
    "INFERENCE_MARK",
    "Owning",
    "adopt",
    "call",
    "carry_mode",
    "drive_async_generator",
    "first_step",
    "in_inference_mode",
    "mode_factory",
    "named_like",
    "steps",
]

F = TypeVar("F", bound="Callable[..., Any]")

# Set on what @inference makes, so that the floors below the decorators can find such methods.
INFERENCE_MARK = "_self_accelerate_tts_inference"


@functools.lru_cache(maxsize=8)
def mode_factory(mode: Mode | Literal["outside"]) -> Enter:
    """What to enter around a step: torch's context for `mode`, or a null context where there is no torch.

    "outside" leaves an inference mode that the caller is in.
    """
    if mode == "none":
        return nullcontext
    try:
        import torch
    except ImportError:
        return nullcontext
    if mode == "outside":
        return functools.partial(torch.inference_mode, mode=False)
    return torch.inference_mode if mode == "inference" else torch.no_grad


def call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode | Literal["outside"]
) -> Any:
    """Call `function` inside `mode`; what it returns is stepped inside `mode` too, if it is a kind that is stepped."""
    enter = mode_factory(mode)
    with enter():
        result = function(*args, **kwargs)
    kind = type(result)
    # Tensors and arrays, the usual answers, are told from the three suspended kinds by one dictionary look-up.
    wrap = _WRAPPERS.get(kind)
    if wrap is not None:
        return wrap(result, enter)
    return adopt(result, mode) if hasattr(kind, "send") or hasattr(kind, "asend") else result


def adopt(result: Any, mode: Mode | Literal["outside"]) -> Any:
    """Wrap a coroutine, generator or async generator so that its body runs inside `mode`; pass others through."""
    enter = mode_factory(mode)
    for kind, wrap in _PROTOCOLS:
        if isinstance(result, kind):
            return wrap(result, enter)
    return result


def in_inference_mode() -> bool:
    """Whether the caller is in torch's inference mode; no torch is imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_inference_mode_enabled()


def carry_mode(function: F) -> F:
    """Give `function` the caller's present mode wherever it runs: in an executor, a thread, another task.

    torch's modes are not inherited by threads or tasks. Inside `with fast_inference():`, say
    `executor.submit(carry_mode(work), item)`.

    Args:
        function: What will run elsewhere; sync, async or generator.

    Returns:
        A function of the same signature. Outside any mode it is `function` itself.

    Raises:
        TypeError: `function` cannot be called.
    """
    if not callable(function):
        raise TypeError(f"carry_mode() needs a function, got {shown(function)}")
    torch = sys.modules.get("torch")
    if torch is None:
        return function
    if torch.is_inference_mode_enabled():
        mode: Mode = "inference"
    elif not torch.is_grad_enabled():
        mode = "no_grad"
    else:
        return function

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Any:
        return call(function, args, kwargs, mode)

    return carried  # type: ignore[return-value]  # wraps() keeps the signature, which its type cannot say


def steps(body: Any, enter: Enter) -> Generator[Any, Any, Any]:
    """Drive `body` (anything with send, throw and close) to its end, each step inside the mode."""
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            with enter():
                item = body.send(value) if error is None else body.throw(error)
        except StopIteration as stop:
            return stop.value
        finally:
            value = error = None  # kept across a suspension, they would keep tensors (in a traceback) alive
        try:
            value = yield item
        except GeneratorExit:
            with enter():
                body.close()
            raise
        except BaseException as thrown:  # whatever the caller throws belongs to the body
            error = thrown
        finally:
            del item


class _Stepping:
    """Makes `steps` awaitable."""

    __slots__ = ("body", "enter")

    def __init__(self, body: Any, enter: Enter) -> None:
        self.body = body
        self.enter = enter

    def __await__(self) -> Generator[Any, Any, Any]:
        return steps(self.body, self.enter)


class Owning(_Stepping):
    """Makes a coroutine awaitable inside a mode, and closes it with itself.

    A task that is cancelled before its first step never runs its coroutine; without this the body would complain
    that it "was never awaited". On a body that has ended, closing does nothing.
    """

    __slots__ = ()

    def __del__(self) -> None:
        self.body.close()


async def _drive_coroutine(stepping: Owning) -> Any:
    return await stepping


_NO_TURN: AbstractAsyncContextManager[object] = nullcontext()


async def drive_async_generator(
    body: Any, enter: Enter, turn: AbstractAsyncContextManager[object] = _NO_TURN
) -> AsyncGenerator[Any, Any]:
    """Drive an async generator to its end: each step inside the mode, and the whole of it inside `turn`."""
    async with turn:
        value: Any = None
        error: BaseException | None = None
        first = True
        try:
            while True:
                step = first_step(body) if first else body.asend(value) if error is None else body.athrow(error)
                value = error = None
                first = False
                try:
                    item = await _Stepping(step, enter)
                except StopAsyncIteration:
                    return
                finally:
                    del step
                try:
                    value = yield item
                except GeneratorExit:
                    raise
                except BaseException as thrown:  # whatever the caller throws belongs to the body
                    error = thrown
                finally:
                    del item
        finally:
            # Also on an early break, a cancellation and the event loop's shutdown: the body's own `finally` runs now.
            await _Stepping(body.aclose(), enter)


def first_step(body: Any) -> Any:
    """The first step of an async generator that another one drives, which is the one that its event loop knows."""
    # An async generator registers with its event loop at its first step, to be closed at the loop's shutdown. The
    # driver is registered and closes the body, in the mode; the body itself must not be closed beside it, outside. Nor
    # by the collector, which finalises both when it finds them in a cycle, the body first: without a finalizer it would
    # be closed on the spot, and an await in its clean-up would be an error.
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _left_to_the_driver)
    try:
        return body.asend(None)
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


def _coroutine(body: Any, enter: Enter) -> Any:
    return named_like(body, _drive_coroutine(Owning(body, enter)))


def _generator(body: Any, enter: Enter) -> Any:
    if body.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE:  # made by types.coroutine: awaited, not iterated
        return _coroutine(body, enter)
    return named_like(body, steps(body, enter))


def _async_generator(body: Any, enter: Enter) -> Any:
    return named_like(body, drive_async_generator(body, enter))


_WRAPPERS: dict[type, Callable[[Any, Enter], Any]] = {
    types.CoroutineType: _coroutine,
    types.GeneratorType: _generator,
    types.AsyncGeneratorType: _async_generator,
}
# For objects of other classes, such as those of compiled extensions.
_PROTOCOLS: tuple[tuple[type, Callable[[Any, Enter], Any]], ...] = (
    (Generator, lambda body, enter: named_like(body, steps(body, enter))),
    (AsyncGenerator, _async_generator),
    (Coroutine, _coroutine),
)
