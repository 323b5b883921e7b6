"""Tokens of somebody else's loop, as they are sampled.

Upstream's loop stays as it is. It runs on a copy of its module that shares all weights and all tuning with the
original (`twin`), and in which a submodule also reports what it is given (`Reporting`). A loop that only returns at its
end runs in a thread (`Tapped`), one token at a time. It goes on when the stream wants more tokens, in the order of a
single thread, so that a seed makes the stream repeatable. A stream that is left stops its loop at the next token.
"""

from __future__ import annotations

import atexit
import contextvars
import gc
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from accelerate_tts.errors import ConcurrencyError
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.caller_settings import CallerSettings
from accelerate_tts.runtime.guard.guard import differs_again, inside_all
from accelerate_tts.runtime.inference_mode import carry_mode
from accelerate_tts.streaming.shares import set_threads

if TYPE_CHECKING:
    from typing_extensions import Self

    from accelerate_tts.streaming.shares import Shares

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_LONGEST_TOKEN = 30.0
"""Seconds that `close` waits for the token that is being made."""
_FORKED = (
    "this stream was begun before os.fork(), and its tokens are made in a thread that the child does not have; begin"
    " a stream in the child"
)


class Left(BaseException):
    """Raised inside a loop whose stream was left. Not an `Exception`, which upstream's code may catch."""


class Tokens(Generic[T]):
    """Tokens of one loop.

    Attributes:
        ended: True if the loop has ended and all its tokens were taken.
        result: What the loop returned.
    """

    ended = False
    result: Any = None

    def take(self, count: int) -> list[T]:
        """Return the next tokens, fewer if the loop ends before.

        Raises:
            Left: The stream was left.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Begin before the first `take`, if the loop may run ahead."""

    def sounded(self, speech: float, computed: float) -> None:
        """Say that a piece of the sound was made of the tokens.

        Args:
            speech: Seconds of speech in it.
            computed: Seconds of speech that were computed for it, with its context.
        """

    def close(self) -> None:
        """Stop the loop, and wait for the token that is being made. Idempotent.

        Closed by the garbage collector, it does not wait.
        """


class Pulled(Tokens[T]):
    """Tokens of a generator, made on the caller's thread.

    Args:
        source: The generator.
        left: Set when the stream is left.
    """

    def __init__(self, source: Iterator[T], left: threading.Event) -> None:
        self._source = source
        self._left = left

    def take(self, count: int) -> list[T]:
        """See `Tokens.take`."""
        found: list[T] = []
        while len(found) < count and not self.ended:
            if self._left.is_set():
                raise Left
            try:
                found.append(next(self._source))
            except StopIteration as stop:
                self.ended, self.result = True, stop.value
        return found

    def close(self) -> None:
        """See `Tokens.close`."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()


class Tapped(Tokens[T]):
    """Tokens of a call that returns at its end only. It runs in a thread, with the caller's inference mode and context.

    Args:
        work: Takes a function to be called with each token, and returns the loop's result.
        left: Set when the stream is left.
        ahead: The loop runs ahead of `take` to its end. Otherwise it makes no token before it is asked for.
        shares: Divides the threads between a loop that runs ahead and the thread that takes its tokens. Without it, the
            loop has half of them.
    """

    def __init__(
        self,
        work: Callable[[Callable[[T], None]], Any],
        left: threading.Event,
        *,
        ahead: bool,
        shares: Shares | None = None,
    ) -> None:
        self._ahead, self._shares = ahead, shares if ahead else None
        self._loop: _Loop[T] = _Loop(left, ahead=ahead, shares=self._shares)
        loop = self._loop  # the thread must not hold this object, whose collection ends it
        context = contextvars.copy_context()
        half = ahead and shares is None
        threads = max(1, torch.get_num_threads() // 2) if half else torch.get_num_threads()
        enter = partial(_as_caller, CallerSettings(), threads)
        self._thread = threading.Thread(
            target=context.run, args=(loop.run, carry_mode(work), enter), name="accelerate_tts-tokens", daemon=True
        )

    def start(self) -> None:
        """See `Tokens.start`."""
        if self._thread.ident is None:
            _loops.add(self._loop)
            _threads.add(self._thread)
            if self._ahead:
                differs_again(
                    "its tokens are made beside its sound (overlap=True), so another attempt would say it otherwise"
                )
            if self._shares is not None:
                self._shares.expect_tokens()
            self._loop.process = os.getpid()
            self._thread.start()

    def take(self, count: int) -> list[T]:
        """See `Tokens.take`."""
        self.start()
        if self._shares is not None:
            self._shares.end_sound()
        found = self._loop.take(count)
        self.ended, self.result = self._loop.over and not self._loop.made, self._loop.result
        if self._shares is not None:
            self._shares.begin("sound")
        return found

    def sounded(self, speech: float, computed: float) -> None:
        """See `Tokens.sounded`."""
        if self._shares is not None:
            self._shares.end_sound(speech, computed)

    def close(self) -> None:
        """See `Tokens.close`."""
        self._loop.leave()
        # The collector may close a stream on any thread, the loop's own one, too, and in the middle of what the loop
        # waits for, such as a pass over the weights that the thread computes for both.
        is_waited_for = not getattr(_here, "is_collecting", False) and self._thread is not threading.current_thread()
        if self._thread.ident is not None and is_waited_for:
            self._thread.join(_LONGEST_TOKEN)

    def __del__(self) -> None:
        if hasattr(self, "_loop"):  # Ctrl-C may have come before
            self._loop.leave()


@contextmanager
def _as_caller(caller: CallerSettings, threads: int) -> Generator[None, None, None]:
    """Scope of a thread with the settings of another one: torch keeps them for each thread.

    With shares the loop then divides the threads with the sound.
    """
    set_threads(threads)
    with caller.entered():
        yield


class _Loop(Generic[T]):
    """State that a loop's thread and its stream share."""

    def __init__(self, left: threading.Event, *, ahead: bool, shares: Shares | None) -> None:
        self._left = left
        self._shares = shares
        self._is_first = True
        self._quit = False
        self._ahead = ahead
        self._wanted = 0
        self._changed = threading.Condition(rlock())  # reentrant: the collector may close a stream anywhere
        self.made: list[T] = []
        self.over = False
        self.result: Any = None
        self._error: BaseException | None = None
        self.process = 0

    def run(
        self, work: Callable[[Callable[[T], None]], Any], enter: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Run the loop, in its thread, inside the settings that `enter` applies."""
        error: BaseException | None = None
        result: Any = None
        try:
            self._wait()
            # Token by token it computes inside the call that asks, otherwise beside it.
            with enter(), inside_all() if self._ahead else nullcontext():
                if self._shares is not None:
                    self._shares.begin("tokens")
                result = work(self.emit)
        except BaseException as raised:  # raised again on the stream's thread
            error = raised
        if self._shares is not None:
            self._shares.end_token(counts=False)
        with self._changed:
            self.over, self.result, self._error = True, result, error
            self._changed.notify_all()

    def emit(self, token: T) -> None:
        """Hand out a token, and wait until one more is wanted."""
        if self._shares is not None:
            self._shares.end_token(counts=not self._is_first)  # the prompt's time is in the first one
        self._is_first = False
        with self._changed:
            self.made.append(token)
            self._changed.notify_all()
        self._wait()
        if self._shares is not None:
            self._shares.begin("tokens")

    def _wait(self) -> None:
        with self._changed:
            while not (self._is_left() or self._ahead or len(self.made) < self._wanted):
                self._changed.wait()
            if self._is_left():
                raise Left

    def _is_left(self) -> bool:
        return self._quit or self._left.is_set()

    def take(self, count: int) -> list[T]:
        with self._changed:
            self._wanted = count
            self._changed.notify_all()
            while len(self.made) < count and not self.over:
                if os.getpid() != self.process:
                    raise ConcurrencyError(_FORKED)
                self._changed.wait()
            self._wanted = 0
            found, self.made = self.made[:count], self.made[count:]
            error, self._error = (self._error, None) if self.over and not self.made else (None, self._error)
            if error is not None:
                raise error
            return found

    def leave(self) -> None:
        with self._changed:
            self._quit = True
            self._changed.notify_all()


_here = threading.local()


def _note_collection(phase: str, _info: object) -> None:
    _here.is_collecting = phase == "start"


gc.callbacks.append(_note_collection)

_loops: weakref.WeakSet[_Loop[Any]] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    """End the loops at exit: Python ends a thread that computes by an exception that torch does not survive."""
    for loop in list(_loops):
        loop.leave()
    for thread in list(_threads):
        if thread.ident is not None:  # not one that could not start
            thread.join(_LONGEST_TOKEN)


def twin(module: M, **replaced: nn.Module) -> M:
    """Return a module that shares all weights and submodules with the original, but not its attributes.

    What a call stores in the twin is its own, so that calls in several threads do not mix.

    Args:
        module: The original.
        **replaced: Submodules of the twin in place of the original's, by their names.
    """
    made: M = object.__new__(type(module))  # the class that tuning gave it
    vars(made).update(vars(module))
    # A compiled call is bound to the original.
    vars(made).update(_modules={**module._modules, **replaced}, _compiled_call_impl=None)
    return made


class Reporting(nn.Module):
    """A module that also reports its arguments. Its attributes are those of the module inside.

    Args:
        module: The module that is called.
        hear: Called with the arguments, before the module.
    """

    def __init__(self, module: nn.Module, hear: Callable[..., object]) -> None:
        super().__init__()
        self.inside = module
        object.__setattr__(self, "_hear", hear)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Report the arguments, and call the module inside."""
        self._hear(*args, **kwargs)
        return self.inside(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the module inside is the original's."""
        del mode
        return self
