"""Make a guarded call, look at what it gives, and make a faulty one again on the untouched model.

The second attempt has the same random numbers: their states are kept from before the first. A coroutine's is untouched
from its beginning to its end, also while it waits (for a thread, perhaps, in which the model runs); a stream's while
its body runs or waits, but not while its consumer has a piece.

A call under whose feet another one's second attempt switched the changes is made again, too: one layer may have been
computed with them and the next one without, in another precision. That is no fault, and is not counted.
"""

from __future__ import annotations

import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ReloadError
from accelerate_tts.runtime import guard, modes
from accelerate_tts.runtime.guard import Heard, Units
from accelerate_tts.runtime.random_states import random_states
from accelerate_tts.runtime.retry import Guarding, Listener, Watcher

if TYPE_CHECKING:
    from accelerate_tts.settings import Mode

__all__ = ["call"]

_OURS = "made again on the untouched model with the same seed"
_GIVEN = "it was given as it is: {}"
_SKIPPED = object()


def call(
    watcher: Watcher, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode
) -> Any:
    """`modes.call`, and a look at what comes of it: of a plain call at once, of the other kinds as they are stepped."""
    attempt = _Attempt(watcher, function, args, kwargs, mode)
    attempt.keep_random()
    try:
        result = attempt.make()
    except Exception:
        again = attempt.disturbed()
        if again is None:
            raise
        with again.untouched():
            attempt.put_random_back()
            result = attempt.make()
        attempt.begin()
    kind = type(result)  # modes.call gives these three kinds only, whatever the function gave
    if kind is types.CoroutineType:
        return modes.named_like(result, _coroutine(attempt, modes.Owning(result, nullcontext)))
    if kind is types.GeneratorType:
        return modes.named_like(result, _generator(attempt, result))
    if kind is types.AsyncGeneratorType:
        return modes.named_like(result, _async_generator(attempt, result))
    again = attempt.disturbed()
    guarding = again or attempt.to_retry(result)
    if guarding is None:
        return result
    with guarding.untouched():
        attempt.put_random_back()
        result = attempt.make()
    return result if again else attempt.settled(result)


class _Attempt:
    """One call, and what is needed to make it again."""

    def __init__(
        self, watcher: Watcher, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode
    ) -> None:
        self.watcher = watcher
        self.name = str(getattr(function, "__qualname__", type(function).__qualname__))
        self._call = function, args, kwargs, mode
        self.units = guard.units_of(args, kwargs)
        self._given = (*args, *kwargs.values())
        self._random: Callable[[], None] | None = None
        self.fault = ""
        self._at_hand: object = None
        self._switched = 0
        self.begin()

    def begin(self) -> None:
        """What is made now begins: from here on it may be disturbed."""
        self._switched = self.watcher.switched if isinstance(self.watcher, Guarding) else 0

    def disturbed(self) -> Guarding | None:
        """The guard that was switched since `begin`, if the call can be made again.

        Another call's second attempt takes the changes off under this one's feet: a half-precision number may have met
        a layer that was in fp32 again, and an exception may be of that. One of the user's own is never taken for it but
        in such a moment.
        """
        moved = isinstance(self.watcher, Guarding) and self.watcher.switched != self._switched
        return self.watcher if moved and not self.not_ready() else None  # type: ignore[return-value]

    def make(self) -> Any:
        """Make the call, inside its mode."""
        return modes.call(*self._call)

    def keep_random(self) -> None:
        """Remember the states of all random numbers; again where a body begins to run later than it was called."""
        if isinstance(self.watcher, Guarding):
            self._random = random_states(self._given)

    def put_random_back(self) -> None:
        """Give the second attempt the random numbers of the first."""
        if self._random is not None:
            self._random()

    def obstacle(self) -> str:
        """Why the call cannot be made again, or ""."""
        # The first attempt has used them up; also an open file.
        used = any(isinstance(value, (Iterator, AsyncIterator)) for value in self._given)
        return "an argument can be read once only" if used else ""

    def not_ready(self) -> str:
        """Why the call cannot be made again on the untouched model, or ""; then that is at hand until the call ends."""
        obstacle = self.obstacle()
        if not obstacle and isinstance(self.watcher, Guarding):
            try:
                self._at_hand = self.watcher.at_hand()
            except ReloadError as error:
                return str(error)
        return obstacle

    def to_retry(self, result: Any) -> Guarding | None:
        """The guard that wants this call made again, or `None` if the result is good or all that can be had."""
        fault = self.watcher.judge(self.name, self.units, guard.hear(result), whole=True)
        guarding = self.watcher
        if fault is None or not isinstance(guarding, Guarding):
            return None
        obstacle = self.not_ready()
        if obstacle:
            guarding.count(self.name, fault, _GIVEN.format(obstacle))
            return None
        self.fault = fault
        return guarding

    def settled(self, result: Any) -> Any:
        """The second attempt's result, with the event that says whose fault it was."""
        self.settle(self.watcher.judge(self.name, self.units, guard.hear(result), whole=True) is not None)
        return result

    def settle(self, same: bool) -> None:
        """Say whose fault it was, by whether the second attempt has one, too."""
        if isinstance(self.watcher, Guarding):
            if same:
                self.watcher.own(self.name, self.fault)
            else:
                self.watcher.count(self.name, self.fault, _OURS)


async def _coroutine(attempt: _Attempt, body: modes.Owning) -> Any:
    attempt.keep_random()
    attempt.begin()
    try:
        result = await body
    except Exception:
        again = attempt.disturbed()
        if again is None:
            raise
        return await _untouched(attempt, again)
    again = attempt.disturbed()
    if again is not None:
        return await _untouched(attempt, again)
    guarding = attempt.to_retry(result)
    if guarding is None:
        return result
    return attempt.settled(await _untouched(attempt, guarding))


async def _untouched(attempt: _Attempt, guarding: Guarding) -> Any:
    # Across suspensions, too: the body may be waiting for a thread in which the model runs.
    with guarding.untouched():
        attempt.put_random_back()
        result = attempt.make()
        return await result if type(result) is types.CoroutineType else result


class _Stream:
    """What has been delivered of a stream, and whether its pieces come from the second attempt.

    A second attempt begins anew, so what was delivered already is skipped: by samples where all pieces are waves, since
    the untouched model may cut them elsewhere, by pieces otherwise.
    """

    def __init__(self, attempt: _Attempt) -> None:
        self.attempt = attempt
        self.guarding: Guarding | None = None
        self.driven = False
        self._pending = False
        self._all = Heard()
        self._pieces = 0
        self._samples: int | None = 0
        self._to_skip = 0
        self._seen = 0

    def scope(self) -> Any:
        """What a step of the body runs in: untouched, in a second attempt."""
        if self.guarding is None:
            self.attempt.begin()
            return nullcontext()
        return self.guarding.untouched()

    def disturbed(self) -> bool:
        """Whether the step that was made was disturbed, and the stream is to begin again."""
        if self.guarding is not None or self.driven:
            return False
        self.guarding, self._to_skip = self.attempt.disturbed(), self._samples or 0
        return self.guarding is not None

    def taken(self, item: Any) -> Any:
        """The item, or what of it is new, or `_SKIPPED`."""
        if self.guarding is None:
            return item
        self._seen += 1
        size = guard.size_of(item)
        if self._samples is not None and size is not None:
            skipped, self._to_skip = self._to_skip, max(0, self._to_skip - size)
            if skipped > 0:
                item = _SKIPPED if size <= skipped else guard.cut(item, skipped)
        elif self._seen <= self._pieces:
            item = _SKIPPED
        return item

    def is_faulty(self, item: Any) -> bool:
        """Whether this piece, or the stream with it, calls for a second attempt; in that one, whether it is better."""
        heard = guard.hear(item)
        if self.guarding is not None:
            if self._pending:
                # A runaway stream that goes on where the first one was broken off runs away, too.
                self._settle(self._judge(heard) is not None or self.attempt.fault == "too long")
            return False
        self._all = self._all.joined(heard)
        fault = self._judge(heard)
        if fault is not None and self._begins_again(fault):
            return True
        self._pieces += 1
        size = guard.size_of(item)
        self._samples = None if size is None or self._samples is None else self._samples + size
        return False

    def _judge(self, heard: Heard) -> str | None:
        attempt = self.attempt
        fault = attempt.watcher.judge(attempt.name, Units(), heard, whole=False)
        if fault is None and self.guarding is None:  # length is judged on all of it so far
            total = Heard(audio=self._all.audio, samples=self._all.samples)
            fault = attempt.watcher.judge(attempt.name, attempt.units, total, whole=False)
        return fault

    def ends_faulty(self) -> bool:
        """Whether all of the stream calls for a second attempt, now that it has ended."""
        if self.guarding is not None:
            if self._pending:
                self._settle(same=self._pieces == 0 and self.attempt.fault == "silent")
            return False
        attempt = self.attempt
        total = self._all if self._pieces else Heard(audio=True)  # nothing at all is the deepest silence
        fault = attempt.watcher.judge(attempt.name, attempt.units, total, whole=True)
        if fault != "silent" or not isinstance(attempt.watcher, Guarding):
            return False  # what else there is was told when it came
        if self._pieces == 0:
            return self._begins_again(fault)
        attempt.watcher.count(attempt.name, fault, _GIVEN.format("all of it was delivered"))
        return False

    def _begins_again(self, fault: str) -> bool:
        attempt, guarding = self.attempt, self.attempt.watcher
        if not isinstance(guarding, Guarding):
            return False
        obstacle = "values were sent into the stream" if self.driven else attempt.not_ready()
        if obstacle:
            attempt.watcher = Listener()  # told once
            guarding.count(attempt.name, fault, _GIVEN.format(obstacle))
            return False
        attempt.fault = fault
        self.guarding, self._pending, self._to_skip = guarding, True, self._samples or 0
        return True

    def _settle(self, same: bool) -> None:
        self._pending = False
        self.attempt.settle(same)


def _generator(attempt: _Attempt, body: Any) -> Generator[Any, Any, Any]:
    attempt.keep_random()
    stream = _Stream(attempt)
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            with stream.scope():
                item = body.send(value) if error is None else body.throw(error)
        except StopIteration as stop:
            if not stream.ends_faulty():
                return stop.value
            body = _again(stream)
            continue
        except Exception:
            if not stream.disturbed():
                raise
            body = _again(stream)
            continue
        finally:
            value = error = None
        item = stream.taken(item)
        if item is _SKIPPED:
            continue
        if stream.disturbed() or stream.is_faulty(item):
            del item
            with suppress(Exception):  # what the given-up attempt does at its end is nobody's business any more
                body.close()
            body = _again(stream)
            continue
        try:
            value = yield item
        except GeneratorExit:
            with stream.scope():
                body.close()
            raise
        except BaseException as thrown:  # whatever the caller throws belongs to the body
            error = thrown
        finally:
            del item
        stream.driven = stream.driven or value is not None or error is not None


def _again(stream: _Stream) -> Any:
    with stream.scope():
        stream.attempt.put_random_back()
        return stream.attempt.make()


async def _async_generator(attempt: _Attempt, body: Any) -> AsyncGenerator[Any, Any]:
    attempt.keep_random()
    stream = _Stream(attempt)
    value: Any = None
    error: BaseException | None = None
    first = True
    try:
        while True:
            # Across the awaits of a step, too (see `_coroutine`); on while the consumer has the piece.
            try:
                with stream.scope():
                    step = (
                        modes.first_step(body) if first else body.asend(value) if error is None else body.athrow(error)
                    )
                    value = error = None
                    first = False
                    item = await step
            except StopAsyncIteration:
                if not stream.ends_faulty():
                    return
                body, first = _again(stream), True
                continue
            except Exception:
                if not stream.disturbed():
                    raise
                body, first = _again(stream), True
                continue
            item = stream.taken(item)
            if item is _SKIPPED:
                continue
            if stream.disturbed() or stream.is_faulty(item):
                del item
                with suppress(Exception):  # see `_generator`
                    await body.aclose()
                body, first = _again(stream), True
                continue
            try:
                value = yield item
            except GeneratorExit:
                raise
            except BaseException as thrown:  # whatever the caller throws belongs to the body
                error = thrown
            finally:
                del item
            stream.driven = stream.driven or value is not None or error is not None
    finally:
        with stream.scope():
            await body.aclose()
