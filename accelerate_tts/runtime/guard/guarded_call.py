"""Guarded calls: check the output, and repeat a faulty call on the untouched model.

The second attempt gets the same random numbers: their states are saved before the first. The object stays untouched
during the whole second attempt, also while a coroutine waits (for example for a thread in which the model runs) and
while the consumer of a stream works on a piece.

Only a faulty output causes a retry. Exceptions and faults of other calls do not.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import ReloadError
from accelerate_tts.inspection.object_tree import can_be_read_once
from accelerate_tts.runtime import inference_mode
from accelerate_tts.runtime.concurrency.queue import running_loop
from accelerate_tts.runtime.drive import SKIPPED, Again, HasBody, Hooks, Owning, Scoped, drive, drive_async, named_like
from accelerate_tts.runtime.guard import checks
from accelerate_tts.runtime.guard.checks import AudioStats, Units
from accelerate_tts.runtime.guard.gate import BusyError, Hold, Step
from accelerate_tts.runtime.guard.guard import Guard, Judge, Listener, retrying
from accelerate_tts.runtime.rng import random_states

if TYPE_CHECKING:
    from accelerate_tts.runtime.mode_choice import ModeChoice
    from accelerate_tts.settings import Mode

_OURS = "the call was made again on the untouched model with the same seed"
_GIVEN = "the output was returned as it is: {}"


def call(  # noqa: PLR0913 - a call, and how it is made
    watchers: tuple[Judge, ...],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode,
    *,
    instance: object = None,
    retry: bool = True,
    choice: ModeChoice | None = None,
) -> Any:
    """Make a call as `inference_mode.call` does, and check its output.

    A plain call is checked at once; coroutines and generators are checked as they run.

    Args:
        watchers: They judge the output. All are guards, or none is.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        mode: The mode that it runs in.
        instance: The object whose method it is.
        retry: True if the call may be repeated.
        choice: See `inference_mode.call`.
    """
    attempt = _Attempt(watchers, (function, args, kwargs, mode, choice), instance, once=not retry)
    attempt.keep_random()
    with attempt.inside():
        result = attempt.make()
    kind = type(result)  # inference_mode.call wraps coroutines and generators in exactly these three kinds
    if kind is types.CoroutineType:
        return named_like(result, _coroutine(attempt, Owning(result, Scoped(nullcontext))))
    if kind is types.GeneratorType:
        return named_like(result, drive(result, _Stream(attempt)))
    if kind is types.AsyncGeneratorType:
        attempt.runs_on_a_loop()
        return named_like(result, drive_async(result, _Stream(attempt)))
    if issubclass(kind, HasBody):
        stream: HasBody = result
        stream.drive_body(lambda body: drive(body, _Stream(attempt, weakref.ref(stream))))
        return stream
    fault = attempt.fault_of(result)
    hold = None if fault is None else attempt.hold(fault)
    if hold is None:
        return result
    with attempt.second(hold):
        result = attempt.make()
        attempt.settle(same=attempt.fault_of(result) is not None)
    return result


class _Attempt:
    """One call and the state needed to repeat it."""

    def __init__(
        self,
        watchers: tuple[Judge, ...],
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Mode, ModeChoice | None],
        instance: object,
        *,
        once: bool,
    ) -> None:
        function, args, kwargs, *_ = call
        self.watchers = watchers
        self.guards = [watcher for watcher in watchers if isinstance(watcher, Guard)]
        self.name = str(getattr(function, "__qualname__", type(function).__qualname__))
        self._call = call
        self.units = checks.units_of(args, kwargs, function)
        self._given = (*args, *kwargs.values())
        self._random: Callable[[], None] | None = None
        self.fault = ""
        self._instance, self._once = instance, once
        self._step = Step(self)

    def make(self) -> Any:
        """Make the call, inside its mode."""
        return inference_mode.call(*self._call)

    @contextmanager
    def inside(self, *, wait: bool = True) -> Generator[None, None, None]:
        """Register the call as inside the model while open.

        Args:
            wait: Wait while the model is being switched.
        """
        if not self.guards:
            yield
            return
        try:
            for guard in self.guards:
                guard.gate.enter(self._step, wait=wait)
            with self._step.entered():
                yield
        finally:
            for guard in self.guards:
                guard.gate.leave(self._step)

    async def ready(self) -> None:
        """Wait as a coroutine until the model is not being switched."""
        for guard in self.guards:
            await guard.gate.ready()

    def runs_on_a_loop(self) -> None:
        """Note the event loop that the call runs on: code that blocks this loop must not wait for the call."""
        self._step.loop = running_loop()

    def keep_random(self) -> None:
        """Save the states of all random number generators; once more if a body starts later than the call."""
        if self.guards and not self._once:
            self._random = random_states((*self._given, self._instance))

    def fault_of(self, result: Any) -> str | None:
        """Return the fault of a whole result, or `None`."""
        return self.judge(self.units, checks.audio_stats(result), whole=True)

    def judge(self, units: Units, stats: AudioStats, *, whole: bool) -> str | None:
        """Return the fault of an output, or `None`."""
        judged = (watcher.judge(self.name, units, stats, whole=whole) for watcher in self.watchers)
        return next((fault for fault in judged if fault is not None), None)

    def obstacle(self) -> str:
        """Return the reason why the call must not be repeated, or ""."""
        if self._once:
            return "the function has retry=False"
        # The first attempt has consumed it.
        return (
            "an argument can be read once only"
            if can_be_read_once(self._given)
            else self._step.obstacle or self._step.differs
        )

    def given(self, fault: str, why: str) -> None:
        """Count a fault of an output that was returned as it is."""
        for guard in self.guards:
            guard.count(self.name, fault, _GIVEN.format(why))

    def hold(self, fault: str) -> list[Hold] | None:
        """Switch the objects off for a second attempt and return the holds; `None` if the call is not repeated."""
        obstacle = self.obstacle()
        try:
            if self.guards and not obstacle:
                self.fault = fault
                return [guard.hold() for guard in self.guards]  # if one raises, the collector releases the others
        except (ReloadError, BusyError) as error:
            obstacle = str(error)
        self.given(fault, obstacle)
        return None

    async def hold_later(self, fault: str) -> list[Hold] | None:
        """Like `hold`, as a coroutine."""
        obstacle = self.obstacle()
        try:
            if self.guards and not obstacle:
                self.fault = fault
                return [await guard.hold_later() for guard in self.guards]
        except (ReloadError, BusyError) as error:
            obstacle = str(error)
        self.given(fault, obstacle)
        return None

    @contextmanager
    def second(self, holds: list[Hold]) -> Generator[None, None, None]:
        """Run a second attempt: restore the random numbers, and release the objects at the end."""
        try:
            with retrying():
                self.put_random_back()
                yield
        finally:
            for hold in holds:
                hold.release()

    def put_random_back(self) -> None:
        """Give the second attempt the random numbers of the first."""
        if self._random is not None:
            self._random()

    def settle(self, *, same: bool) -> None:
        """Attribute the fault: to the model if the second attempt has one, too, otherwise to the tuning.

        Called before the object is switched back.
        """
        for guard in self.guards:
            if same:
                guard.own(self.name, self.fault)
            else:
                guard.count(self.name, self.fault, _OURS)


async def _coroutine(attempt: _Attempt, body: Owning) -> Any:
    attempt.runs_on_a_loop()
    with closing(body):  # cancelled while the model is switched, it never begins
        await attempt.ready()
        attempt.keep_random()
        with attempt.inside(wait=False):
            result = await body
    fault = attempt.fault_of(result)
    hold = None if fault is None else await attempt.hold_later(fault)
    if hold is None:
        return result
    with attempt.second(hold):
        result = attempt.make()
        result = await result if type(result) is types.CoroutineType else result
        attempt.settle(same=attempt.fault_of(result) is not None)
    return result


class _Stream(Hooks):
    """Checks the pieces of a stream, and restarts it after a fault.

    A second attempt starts from the beginning, so what was already delivered is skipped: by samples if all pieces are
    waves, since the untouched model may cut them elsewhere, otherwise by pieces.

    Args:
        attempt: The call.
        owner: Returns the object around the stream that the caller has, if there is one.
    """

    def __init__(self, attempt: _Attempt, owner: Callable[[], HasBody | None] = lambda: None) -> None:
        self.attempt = attempt
        self._owner = owner
        self._begun = self._driven = False
        self._hold: list[Hold] | None = None
        self._pending = False
        self._all = AudioStats()
        self._pieces = 0
        self._samples: int | None = 0
        self._to_skip = 0
        self._seen = 0

    # --- hooks ----------------------------------------------------------------------------------------------------

    def span(self, *, closing: bool) -> AbstractContextManager[Any]:
        """Return the scope of a step: without guards in a second attempt, otherwise registered as inside the model."""
        if self._hold is not None:
            return retrying()
        if not self._begun:
            self._begun = True
            self.attempt.keep_random()
        return self.attempt.inside(wait=not closing)

    async def ready(self) -> None:
        """See `_Attempt.ready`."""
        if self._hold is None:
            await self.attempt.ready()

    def got(self, item: Any) -> Any:
        """Return the item, its undelivered part in a second attempt, or `Again` with the second attempt."""
        if self._hold is not None:
            return self._new_of(item)
        fault = self._fault_with(item)
        if fault is not None and self._may_begin_again(fault):
            self._hold = self.attempt.hold(fault)
            self._told_once()
        return self._counted(item) if self._hold is None else self._again()

    async def got_later(self, item: Any) -> Any:
        """Like `got`, as a coroutine."""
        if self._hold is not None:
            return self._new_of(item)
        fault = self._fault_with(item)
        if fault is not None and self._may_begin_again(fault):
            self._hold = await self.attempt.hold_later(fault)
            self._told_once()
        return self._counted(item) if self._hold is None else self._again()

    def ended(self) -> Again | None:
        """Check a stream that has ended; return `Again` if it is repeated."""
        if self._is_empty():
            self._hold = self.attempt.hold("silent")
            return None if self._hold is None else self._again()
        return None

    async def ended_later(self) -> Again | None:
        """Like `ended`, as a coroutine."""
        if self._is_empty():
            self._hold = await self.attempt.hold_later("silent")
            return None if self._hold is None else self._again()
        return None

    def sent(self) -> None:
        """Note that a value was sent into the stream, which cannot be sent again."""
        self._driven = True

    def closed(self) -> None:
        """Release the object, which may then be switched back."""
        for hold in self._hold or ():
            hold.release()

    # --- outcome --------------------------------------------------------------------------------------------------

    def _again(self) -> Again:
        self._pending, self._to_skip = True, self._samples or 0
        with retrying():
            self.attempt.put_random_back()
            made = self.attempt.make()
        owner = self._owner()
        if owner is not None:
            owner.succeeded_by(made)
        return Again(made)

    def _may_begin_again(self, fault: str) -> bool:
        attempt = self.attempt
        if not attempt.guards:
            return False
        obstacle = "values were sent into the stream" if self._driven else attempt.obstacle()
        if obstacle:
            attempt.given(fault, obstacle)
            self._told_once()
        return not obstacle

    def _told_once(self) -> None:
        if self._hold is None:
            self.attempt.watchers = (Listener(),)

    def _counted(self, item: Any) -> Any:
        self._pieces += 1
        size = checks.size_of(item)
        self._samples = None if size is None or self._samples is None else self._samples + size
        return item

    def _new_of(self, item: Any) -> Any:
        """Return the part of a second attempt's piece that was not delivered yet, or `SKIPPED`."""
        self._seen += 1
        size = checks.size_of(item)
        if self._samples is not None and size is not None:
            skipped, self._to_skip = self._to_skip, max(0, self._to_skip - size)
            if skipped > 0:
                item = SKIPPED if size <= skipped else checks.cut(item, skipped)
        elif self._seen <= self._pieces:
            item = SKIPPED
        if item is not SKIPPED and self._pending:
            # A stream that continues where the first one was stopped as too long is too long as well.
            self._settle(same=self._judge(checks.audio_stats(item)) is not None or self.attempt.fault == "too long")
        return item

    def _fault_with(self, item: Any) -> str | None:
        """Return the fault of a piece of the first attempt, or of the stream so far."""
        stats = checks.audio_stats(item)
        self._all = self._all.joined(stats)
        fault = self._judge(stats)
        if fault is None:
            total = AudioStats(audio=self._all.audio, samples=self._all.samples)  # length alone
            fault = self.attempt.judge(self.attempt.units, total, whole=False)
        return fault

    def _judge(self, stats: AudioStats) -> str | None:
        return self.attempt.judge(Units(), stats, whole=False)

    def _is_empty(self) -> bool:
        """Check that the stream had no pieces although there was text, and may be repeated; reports a silent stream."""
        if self._hold is not None:
            if self._pending:
                self._settle(same=self._pieces == 0 and self.attempt.fault == "silent")
            return False
        attempt = self.attempt
        total = self._all if self._pieces else AudioStats(audio=True)  # no piece at all counts as silence
        fault = attempt.judge(attempt.units, total, whole=True)
        if fault != "silent" or not attempt.guards:
            return False  # other faults were reported with their piece
        if self._pieces == 0:
            return self._may_begin_again(fault)
        attempt.given(fault, "all of it was delivered")
        return False

    def _settle(self, *, same: bool) -> None:
        self._pending = False
        self.attempt.settle(same=same)
