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
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accelerate_tts.errors import shown
from accelerate_tts.runtime.drive import Again, Hooks, Owning, Scoped, drive, drive_async, named_like

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate_tts.runtime.mode_choice import ModeChoice
    from accelerate_tts.settings import Mode

    Enter = Callable[[], AbstractContextManager[Any]]

__all__ = [
    "INFERENCE_MARK",
    "adopt",
    "call",
    "carry_mode",
    "in_inference_mode",
    "is_on",
    "is_suspended",
    "mode_factory",
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
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode | Literal["outside"],
    choice: ModeChoice | None = None,
) -> Any:
    """Call `function` inside `mode`; what it returns is stepped inside `mode` too, if it is a kind that is stepped.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        mode: The mode.
        choice: Chooses a milder mode, if the call fails by this one.
    """
    enter = mode_factory(mode)
    try:
        with enter():
            result = function(*args, **kwargs)
    except Exception as error:
        if choice is None or not choice.milder(error):
            raise
        result, enter = _called_again(choice, error)
    kind = type(result)
    # Tensors and arrays, the usual answers, are told from the three suspended kinds by one dictionary look-up.
    wrap = _WRAPPERS.get(kind)
    if wrap is not None:
        return wrap(result, Scoped(enter) if choice is None else _Choosing(enter, choice, delivers=_delivers(result)))
    if choice is not None:
        choice.settle()
    return adopt(result, mode) if hasattr(kind, "send") or hasattr(kind, "asend") else result


def _called_again(choice: ModeChoice, error: Exception) -> tuple[Any, Enter]:
    enter = mode_factory(choice.mode)
    try:
        with enter():
            return choice.make(), enter
    except Exception as second:
        choice.milder(second)  # which notes that it was in vain
        raise error from None


class _Choosing(Scoped):
    """Has a suspended body begin again in a milder mode."""

    __slots__ = ("choice", "delivered", "delivers")

    def __init__(self, enter: Enter, choice: ModeChoice, *, delivers: bool) -> None:
        super().__init__(enter)
        self.choice = choice
        self.delivers, self.delivered = delivers, False

    def got(self, item: Any) -> Any:
        if self.delivers and not self.delivered:
            self.delivered = True
            self.choice.settle()
        return item

    def ended(self) -> None:
        if not self.delivered:
            self.choice.settle()

    def failed(self, error: Exception) -> Again | None:
        first = self.choice.raised
        if self.choice.milder(error, given=self.delivered):
            self.scope = mode_factory(self.choice.mode)  # type: ignore[method-assign]  # see `Scoped`
            with self.scope():
                return Again(self.choice.make())
        if first is not None and not self.delivered:
            raise first from None  # the milder mode did not mend it
        return None


def _delivers(body: Any) -> bool:
    """Whether what it yields is for the caller, and not for an event loop."""
    if isinstance(body, types.GeneratorType):
        return not body.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE
    return isinstance(body, types.AsyncGeneratorType)


def adopt(result: Any, mode: Mode | Literal["outside"]) -> Any:
    """Wrap a coroutine, generator or async generator so that its body runs inside `mode`; pass others through."""
    enter = mode_factory(mode)
    for kind, wrap in _PROTOCOLS:
        if isinstance(result, kind):
            return wrap(result, Scoped(enter))
    return result


def is_suspended(result: Any) -> bool:
    """Whether what a call returned is still to be stepped."""
    kind = type(result)
    return kind in _WRAPPERS or hasattr(kind, "send") or hasattr(kind, "asend")


def is_on(mode: Mode) -> bool:
    """Whether the caller is in the inference mode that is asked for."""
    return mode == "inference" and in_inference_mode()


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


async def _drive_coroutine(owning: Owning) -> Any:
    return await owning


def _coroutine(body: Any, hooks: Hooks) -> Any:
    return named_like(body, _drive_coroutine(Owning(body, hooks)))


def _generator(body: Any, hooks: Hooks) -> Any:
    if body.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE:  # made by types.coroutine: awaited, not iterated
        return _coroutine(body, hooks)
    return named_like(body, drive(body, hooks))


def _async_generator(body: Any, hooks: Hooks) -> Any:
    return named_like(body, drive_async(body, hooks))


_WRAPPERS: dict[type, Callable[[Any, Hooks], Any]] = {
    types.CoroutineType: _coroutine,
    types.GeneratorType: _generator,
    types.AsyncGeneratorType: _async_generator,
}
# For objects of other classes, such as those of compiled extensions.
_PROTOCOLS: tuple[tuple[type, Callable[[Any, Hooks], Any]], ...] = (
    (Generator, lambda body, hooks: named_like(body, drive(body, hooks))),
    (AsyncGenerator, _async_generator),
    (Coroutine, _coroutine),
)
