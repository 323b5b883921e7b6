"""Calls of any kind inside an inference mode, which never leaks to other code.

torch's modes belong to a thread, and a coroutine or a generator gives up its thread at every suspension. A mode that is
entered around the whole body would stay on for other code, or be off for the body. Here the mode is entered for each
*step* of the body (`send`, `throw`, `close`) and left before the suspension. Bodies always run inside the mode and
callers never do, for any order of interleaving, cancelling and closing. A body that is suspended inside a mode of its
own (`with torch.enable_grad(): ... yield`) finds that mode in its next step.

There is one exception: the garbage collector closes a suspended generator in a reference cycle directly, not through
its driver, in the mode of the collecting thread.

The kind of call is decided by the returned object, not by the function, since a decorated `async def` may not look like
one.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accelerate_tts.errors import shown
from accelerate_tts.runtime.call_end import end_call
from accelerate_tts.runtime.drive import Again, Hooks, Owning, Scoped, drive, drive_async, named_like

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate_tts.runtime.mode_choice import ModeChoice
    from accelerate_tts.runtime.own_random import OwnRandom
    from accelerate_tts.settings import Mode

    Enter = Callable[[], AbstractContextManager[Any]]

F = TypeVar("F", bound="Callable[..., Any]")

# Set on functions that @inference makes, so that lower layers can find such methods.
INFERENCE_MARK = "_self_accelerate_tts_inference"

_MOST_DECORATORS = 50


def decorated(member: Any) -> Iterator[Any]:
    """Yield the function of a member of a class and, where decorators are on top of each other, those beneath it.

    Args:
        member: A function, class method or static method. Others are yielded as they are.
    """
    function = getattr(member, "__func__", member)
    for _ in range(_MOST_DECORATORS):
        yield function
        beneath = getattr(function, "__wrapped__", None)  # of `functools.wraps`
        if beneath is None or not isinstance(function, types.FunctionType):
            return
        function = beneath


@functools.lru_cache(maxsize=8)
def mode_factory(mode: Mode | Literal["outside"]) -> Enter:
    """Return the context factory for a step in `mode`; a null context without torch.

    "outside" leaves the caller's inference mode.
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


class _StepMode:
    """Context of each step of one body: its mode, or the one that the body itself had set at its last suspension.

    Args:
        enter: Returns the context of the first step.
    """

    __slots__ = ("_changed", "_enter", "_first", "_scope")

    def __init__(self, enter: Enter) -> None:
        self._enter = enter
        self._changed: tuple[bool, bool] | None = None

    def __call__(self) -> _StepMode:
        return self  # a body makes one step at a time

    def __enter__(self) -> None:
        changed = self._changed
        self._scope = self._enter() if changed is None else _under(*changed)
        self._scope.__enter__()
        if changed is None:
            self._first = _modes()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        modes = _modes()
        self._changed = None if modes == self._first else modes
        self._scope.__exit__(kind, error, traceback)


def _modes() -> tuple[bool, bool]:
    """Return the thread's inference mode and gradient mode."""
    torch = sys.modules["torch"]
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@contextmanager
def _under(inference: bool, gradients: bool) -> Generator[None, None, None]:
    torch = sys.modules["torch"]
    with torch.inference_mode(mode=inference), torch.set_grad_enabled(gradients):
        yield


def stepped(mode: Mode | Literal["outside"]) -> Enter:
    """Return the context factory for the steps of one body in `mode`."""
    enter = mode_factory(mode)
    return enter if enter is nullcontext else _StepMode(enter)


def call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode | Literal["outside"],
    choice: ModeChoice | None = None,
) -> Any:
    """Call `function` inside `mode`. A returned coroutine, generator or async generator runs inside `mode`, too.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        mode: The mode.
        choice: Knows if the object needs a milder mode, and chooses one if the call fails because of its mode.
    """
    if choice is not None:
        mode = choice.mode
    enter = mode_factory(mode)
    try:
        with enter():
            result = function(*args, **kwargs)
    except Exception as error:
        if choice is None or not choice.milder(error):
            raise
        again = _called_again(choice)
        if again is None:
            raise
        (result,), mode = again, choice.mode
    kind = type(result)
    # One dictionary look-up separates tensors and arrays, the usual results, from the three suspended kinds.
    wrap = _WRAPPERS.get(kind)
    if wrap is not None:
        enter = stepped(mode)
        return wrap(result, Scoped(enter) if choice is None else _Choosing(enter, choice, delivers=_delivers(result)))
    if choice is not None:
        choice.settle()
        end_call()
    return adopt(result, mode) if hasattr(kind, "send") or hasattr(kind, "asend") else result


def _called_again(choice: ModeChoice) -> tuple[Any] | None:
    """Return the result in the milder mode, or `None` if it fails there, too."""
    try:
        with mode_factory(choice.mode)():
            return (choice.make(),)
    except Exception as second:
        choice.milder(second)  # notes that the milder mode did not help
        return None


class _Choosing(Scoped):
    """Restarts a suspended body in a milder mode."""

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
            self.scope = stepped(self.choice.mode)  # type: ignore[method-assign]  # see `Scoped`
            with self.scope():
                return Again(self.choice.make())
        if first is not None and not self.delivered:  # the milder mode did not help
            context = first.__context__
            try:
                raise first
            finally:  # Python has set the exception that is being handled, but the first one is the user's as it was
                first.__context__ = context
        return None

    def closed(self) -> None:
        end_call()


def _delivers(body: Any) -> bool:
    """Check that a body yields items for the caller rather than for an event loop."""
    if isinstance(body, types.GeneratorType):
        return not body.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE
    return isinstance(body, types.AsyncGeneratorType)


def adopt(result: Any, mode: Mode | Literal["outside"]) -> Any:
    """Wrap a coroutine, generator or async generator so that its body runs inside `mode`; pass others through.

    An object that is more than that, such as a stream with methods of its own, is passed through, since a driver would
    not have them.
    """
    for kind, wrap in _PROTOCOLS:
        if isinstance(result, kind):
            return wrap(result, Scoped(stepped(mode))) if _is_body_alone(type(result)) else result
    return result


_OF_BODIES = re.compile(r"(gi|cr|ag)_\w+|a?(send|throw|close)|_.*")


def _is_body_alone(kind: type) -> bool:
    """Check that objects of a class have a body's protocol and nothing else, as Python's own and compiled ones."""
    if kind in _WRAPPERS:
        return True
    scopes = hasattr(kind, "__enter__") or hasattr(kind, "__aenter__")
    return not (kind.__dictoffset__ or scopes) and all(map(_OF_BODIES.fullmatch, dir(kind)))


def is_suspended(result: Any) -> bool:
    """Check for a coroutine, a generator or an async generator, or an object with their protocol."""
    kind = type(result)
    return kind in _WRAPPERS or hasattr(kind, "send") or hasattr(kind, "asend")


def is_on(mode: Mode) -> bool:
    """Check that the caller is already in the requested inference mode."""
    return mode == "inference" and in_inference_mode()


def in_inference_mode() -> bool:
    """Check that the caller is in torch's inference mode, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_inference_mode_enabled()


def carry_mode(function: F) -> F:
    """Run `function` in the caller's present mode wherever it is called: in an executor, a thread, another task.

    Threads and tasks do not inherit torch's modes. Inside `with fast_inference():` or `with own_random(seed):`, write
    `executor.submit(carry_mode(work), item)`.

    Args:
        function: The function; sync, async or generator.

    Returns:
        A function of the same signature. Outside any mode it is `function` itself.

    Raises:
        TypeError: `function` is not callable.
    """
    if not callable(function):
        raise TypeError(f"carry_mode() needs a function, got {shown(function)}")
    torch = sys.modules.get("torch")
    if torch is None:
        return function
    from accelerate_tts.runtime.own_random import opened

    if torch.is_inference_mode_enabled():
        mode: Mode = "inference"
    else:
        mode = "none" if torch.is_grad_enabled() else "no_grad"
    own = opened()
    if mode == "none" and own is None:
        return function

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Any:
        return call(function, args, kwargs, mode) if own is None else _call_drawing(function, args, kwargs, mode, own)

    return carried  # type: ignore[return-value]  # wraps() keeps the signature, which its type does not express


def _call_drawing(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode, own: OwnRandom
) -> Any:
    """Call `function` inside `mode`, with random numbers of its own in each step of what it returns."""
    from accelerate_tts.runtime.own_random import Entry

    with Entry(own):
        result = call(function, args, kwargs, mode)
    wrap = _WRAPPERS.get(type(result))
    return result if wrap is None else wrap(result, Scoped(lambda: Entry(own)))


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
# Protocols of other classes, such as those of compiled extensions.
_PROTOCOLS: tuple[tuple[type, Callable[[Any, Hooks], Any]], ...] = (
    (Generator, lambda body, hooks: named_like(body, drive(body, hooks))),
    (AsyncGenerator, _async_generator),
    (Coroutine, _coroutine),
)
