"""Scopes of a thread: `fast_inference()` for scripts, and `own_random()` for calls beside others."""

from __future__ import annotations

import inspect
import sys
import weakref
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, NoReturn

from accelerate_tts.errors import InferenceContextError, SettingsError, shown
from accelerate_tts.settings import Mode, check_mode, is_active

if TYPE_CHECKING:
    from contextlib import ExitStack
    from types import FrameType, TracebackType

    from accelerate_tts.device.flags import HeldFlags
    from accelerate_tts.runtime.own_random import Entry

_SUSPENDED = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE | inspect.CO_GENERATOR
_ADVICE = (
    "its thread-local mode would leak to other code at the next await or yield. Decorate that function with"
    " @inference, or move the block into a plain function and call that"
)
_ADVICE_ON_RANDOM = (
    "its thread-local mode would leak to other code at the next await or yield. Call the function from a plain one"
    " instead: `with own_random(seed): return carry_mode(function)(...)`"
)


@dataclass
class _Entry:
    """One entry into a scope: what it opened, the flags that it holds, and what ends it if the scope is dropped."""

    scope: ExitStack
    held: HeldFlags
    dropped: weakref.finalize[..., fast_inference] | None = None


class fast_inference:  # noqa: N801 - used like a function, as contextlib's own are
    """Runs a block of synchronous code without autograd, with the device's fast process-wide flags on.

    The flags are TF32 and cuDNN autotune on CUDA, TF32 on ROCm, and none elsewhere. Scopes may nest and overlap in any
    threads; the last one to end restores the flags from before the first. Threads started inside do not inherit the
    mode: give them `carry_mode(work)`.

    Args:
        mode: "inference", "no_grad" or "none", as for `@inference`.

    Raises:
        SettingsError: The mode is unknown.
        InferenceContextError: Entered in the body of a coroutine, generator or async generator.

    Example:
        >>> with fast_inference():
        ...     wav = model(**inputs).waveform
    """

    def __init__(self, *, mode: Mode = "inference") -> None:
        check_mode(mode)
        self._mode = mode
        self._scopes: dict[int, list[_Entry]] = {}  # by thread, since several may share one object

    def __enter__(self) -> None:
        _refuse_suspended(sys._getframe(1), f"fast_inference() was entered inside {{}}(): {_ADVICE}")
        from contextlib import ExitStack

        from accelerate_tts.device.flags import HeldFlags

        entry = _Entry(ExitStack(), HeldFlags())
        try:
            self._scopes.setdefault(get_ident(), []).append(entry)
            # For Ctrl-C at the very beginning of `__exit__`, which is then not run.
            entry.dropped = weakref.finalize(self, _end, get_ident(), entry.scope, entry.held)
            if is_active():
                from accelerate_tts.optimizer import get_performance_optimizer
                from accelerate_tts.runtime.call_end import end_call
                from accelerate_tts.runtime.inference_mode import mode_factory

                entry.scope.callback(end_call)
                entry.scope.callback(entry.held.release)
                entry.held.take(get_performance_optimizer().call_flags())
                entry.scope.enter_context(mode_factory(self._mode)())
        except BaseException:
            self._leave(entry)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entry = self._scopes[get_ident()][-1]
        try:
            entry.scope.__exit__(kind, error, traceback)
        finally:  # also after Ctrl-C in it
            self._leave(entry)

    def _leave(self, entry: _Entry) -> None:
        """End a scope, and forget it. Idempotent."""
        scopes = self._scopes.get(get_ident(), [])
        try:
            _end(get_ident(), entry.scope, entry.held)
        finally:
            scopes[:] = [other for other in scopes if other is not entry]
            if not scopes:
                self._scopes.pop(get_ident(), None)
            if entry.dropped is not None:
                entry.dropped.detach()

    async def __aenter__(self) -> NoReturn:
        raise InferenceContextError(f"`async with fast_inference()` cannot be: {_ADVICE}")

    async def __aexit__(self, *_: object) -> None:  # never entered
        return


class own_random:  # noqa: N801 - likewise
    """Draws torch's random numbers in a block of synchronous code from generators of its own, one a device.

    torch's generators belong to the process, so what a call says after `torch.manual_seed` depends on other threads
    that draw meanwhile. In this block each draw gives what it gives after `torch.manual_seed(seed)` in a process with
    nothing else, and no draw of this thread reaches the process's generators. Concurrent calls, such as those that
    share decode steps, stay repeatable one by one.

    Threads started inside, and bodies of coroutines and generators, do not inherit it: give them `carry_mode(work)`.
    Blocks may nest; the innermost counts. It works whether or not the package is switched on. Not reached are dropout
    inside attention and recurrent layers, which draws in training only, draws in C++ extensions and in your own
    compiled code, and the generators of Python and NumPy; `torch.manual_seed` in the block seeds the process's. What
    `torch.utils.checkpoint` computes again in a backward pass draws other numbers than before (an event says so). Parts
    that draw and that tuning has compiled run uncompiled, and so do those of which dynamo makes more than one graph.

    Args:
        seed: The seed, an integer from -2**63 to 2**64 - 1, as `torch.manual_seed` takes it.

    Raises:
        SettingsError: The seed is no such number.
        InferenceContextError: Entered in the body of a coroutine, generator or async generator.

    Example:
        >>> def speak(text, seed):
        ...     with own_random(seed):
        ...         return model.generate(text)
    """

    def __init__(self, seed: int) -> None:
        self._seed = _seed_of(seed)
        self._entries: dict[int, list[Entry]] = {}  # by thread, since several may share one object

    def __enter__(self) -> None:
        _refuse_suspended(sys._getframe(1), f"own_random() was entered inside {{}}(): {_ADVICE_ON_RANDOM}")
        from accelerate_tts.runtime.own_random import Entry, OwnRandom

        entry = Entry(OwnRandom(self._seed))
        self._entries.setdefault(get_ident(), []).append(entry)
        try:
            entry.__enter__()
        except BaseException:
            self._forget(entry)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entry = self._entries[get_ident()][-1]
        try:
            entry.__exit__(kind, error, traceback)
        finally:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """Forget an entry. If Ctrl-C has left its mode on, that ends with it."""
        entries = self._entries.get(get_ident(), [])
        entries[:] = [other for other in entries if other is not entry]
        if not entries:
            self._entries.pop(get_ident(), None)

    async def __aenter__(self) -> NoReturn:
        raise InferenceContextError(f"`async with own_random(...)` cannot be: {_ADVICE_ON_RANDOM}")

    async def __aexit__(self, *_: object) -> None:  # never entered
        return


def _seed_of(seed: object) -> int:
    """Return a seed that torch takes.

    Raises:
        SettingsError: It is no integer in torch's range.
    """
    import operator

    try:
        number = operator.index(seed)  # type: ignore[arg-type]  # also NumPy's integers
    except TypeError:
        number = None
    if isinstance(seed, bool) or number is None or not -(2**63) <= number < 2**64:
        raise SettingsError(f"own_random({shown(seed)}): a seed must be an integer from -2**63 to 2**64 - 1")
    return number


def _end(thread: int, scope: ExitStack, held: HeldFlags) -> None:
    """Close what a scope opened, in its own thread, and release its flags. Idempotent."""
    try:
        if thread == get_ident():
            scope.close()
    finally:
        held.release()


def _refuse_suspended(frame: FrameType | None, message: str) -> None:
    # A plain function called from a coroutine is safe, since it cannot be suspended; the coroutine's own body is not.
    frame, _ = _outside_contextlib(frame)
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        # A generator that is a context manager keeps the mode on for the body of its `with`, as intended. The function
        # with that `with` is checked instead.
        owner, through_contextlib = _outside_contextlib(frame.f_back)
        if not through_contextlib:
            break
        frame = owner
    if frame is not None and frame.f_code.co_flags & _SUSPENDED:
        raise InferenceContextError(message.format(frame.f_code.co_name))


def _outside_contextlib(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    passed = False
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":  # ExitStack, @contextmanager
        frame, passed = frame.f_back, True
    return frame, passed
