"""What happened, as data: frozen dataclasses, sent to hooks and logged once.

A degradation (a fallback, a failed warm-up, a setting that came too late) is never silent: it is an `Event` with
`degraded = True`, which is logged at WARNING the first time it happens and at DEBUG after that. Hooks see each one,
every time, so a metrics system can count them without this library depending on it::

    remove = accelerate_tts.add_hook(lambda event: counter.labels(type(event).__name__).inc())
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from accelerate_tts.errors import printable, shown
from accelerate_tts.locks import rlock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BackedOff",
    "BudgetTooSmall",
    "Event",
    "EventHook",
    "FellBack",
    "Guarded",
    "NotApplied",
    "PackIgnored",
    "Prepared",
    "Recompiled",
    "Restored",
    "Retuned",
    "Tidied",
    "Trying",
    "Tuned",
    "TunedUnderLoad",
    "Undone",
    "Warmed",
    "WarmupFailed",
    "add_hook",
    "emit",
]

logger = logging.getLogger("accelerate_tts")


@dataclass(frozen=True)
class Event:
    """Something that happened. `str(event)` is the line that is logged."""

    degraded: ClassVar[bool] = False


@dataclass(frozen=True)
class Prepared(Event):
    """A device was detected and its set-up applied."""

    device: str
    applied: tuple[str, ...]

    def __str__(self) -> str:
        return f"device {self.device} ready: {', '.join(self.applied) or 'nothing to set'}"


@dataclass(frozen=True)
class Warmed(Event):
    """A warm-up pass succeeded."""

    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}: warm after {self.seconds:.2f} s"


@dataclass(frozen=True)
class Trying(Event):
    """A stage is about to be tried on a part: the start of something that may take seconds."""

    what: str
    stage: str

    def __str__(self) -> str:
        return f"{self.what}: trying {self.stage}"


@dataclass(frozen=True)
class Tuned(Event):
    """Tuning of one loaded object ended."""

    what: str
    kept: int
    tried: int
    ratio: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.what}: kept {self.kept} of {self.tried} optimisations, {self.ratio:.2f}x eager,"
            f" in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Restored(Event):
    """An object was put into the state that a warm pack describes, without tuning."""

    what: str
    kept: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}: {self.kept} optimisations from a warm pack, checked and ready in {self.seconds:.1f} s"


@dataclass(frozen=True)
class TunedUnderLoad(Event):
    """An object was tuned while others used the machine, so some verdicts are not sure; a later load tries them again.

    Attributes:
        what: The tuned object.
        reason: Who used what.
        unsure: Verdicts that are not sure, on what was kept and on what was dropped.
        tried: All verdicts.
    """

    degraded: ClassVar[bool] = True

    what: str
    reason: str
    unsure: int
    tried: int

    def __str__(self) -> str:
        return f"{self.what}: {self.unsure} of {self.tried} verdicts are not sure, since {self.reason}"


@dataclass(frozen=True)
class BudgetTooSmall(Event):
    """There was no time for what promised most.

    Attributes:
        what: The part of the tuned object.
        stage: The optimisation that was not tried, or not timed.
        seconds: The budget that there was (`tune_seconds`).
        wants: About the budget that it would have been tried with.
    """

    degraded: ClassVar[bool] = True

    what: str
    stage: str
    seconds: float
    wants: float

    def __str__(self) -> str:
        return f"{self.what}: {self.stage} wants a tune_seconds of about {self.wants:.0f}, and had {self.seconds:g}"


@dataclass(frozen=True)
class Retuned(Event):
    """What an earlier process decided on a disturbed machine was tried again, and the warm pack renewed.

    Attributes:
        what: The tuned object.
        tried: Verdicts that were not sure.
        unsure: Those that still are not.
        before: The ratio of the whole that the earlier process found.
        ratio: The ratio of the whole now.
    """

    what: str
    tried: int
    unsure: int
    before: float
    ratio: float

    def __str__(self) -> str:
        again = f", {self.unsure} are still not sure" if self.unsure else ""
        return (
            f"{self.what}: {self.tried} verdicts of a busy machine tried again{again};"
            f" {self.before:.2f}x before, {self.ratio:.2f}x now"
        )


@dataclass(frozen=True)
class Undone(Event):
    """An optimised object was put back to its untouched state on request."""

    what: str

    def __str__(self) -> str:
        return f"{self.what}: back to the untouched model"


@dataclass(frozen=True)
class Recompiled(Event):
    """A compiled part met an input outside what it was warmed up for, and was compiled again in service."""

    degraded: ClassVar[bool] = True

    what: str
    graphs: int
    shapes: str
    guard: str = ""

    def __str__(self) -> str:
        why = f", since {self.guard} does not hold" if self.guard else ""
        return f"{self.what}: recompiled in service for {self.shapes}{why} (graph {self.graphs}); warm up with the like"


@dataclass(frozen=True)
class FellBack(Event):
    """An optimisation could not be used; the untouched model answers instead."""

    degraded: ClassVar[bool] = True

    what: str
    stage: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.stage} is off, the untouched model is used: {self.reason}"


@dataclass(frozen=True)
class Guarded(Event):
    """A faulty output was noticed in service, and what was done about it.

    Attributes:
        what: The tuned object.
        function: The `@inference` function that gave it.
        fault: "NaN or Inf", "silent", "clipped flat" or "too long".
        outcome: What the caller got.
        count: The faults of the object that are put down to its tuning, with this one; 0 for one that is not.
    """

    degraded: ClassVar[bool] = True

    what: str
    function: str
    fault: str
    outcome: str
    count: int = 0

    def __str__(self) -> str:
        number = f" (fault {self.count})" if self.count else ""
        return f"{self.what}: the output of {self.function} was {self.fault}{number}; {self.outcome}"


@dataclass(frozen=True)
class WarmupFailed(Event):
    """A warm-up pass raised; the object is left as it was loaded."""

    degraded: ClassVar[bool] = True

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: warm-up failed, nothing was optimised: {self.reason}"


@dataclass(frozen=True)
class NotApplied(Event):
    """A setting had no effect, and what to do about it."""

    degraded: ClassVar[bool] = True

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} was not applied: {self.reason}"


@dataclass(frozen=True)
class PackIgnored(Event):
    """A warm pack, or a part of one, could not be read or kept; what it would have saved is done anew."""

    degraded: ClassVar[bool] = True

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} was ignored: {self.reason}"


@dataclass(frozen=True)
class Tidied(Event):
    """Something that upstream leaves behind at each call was taken away, and is from here on."""

    what: str
    left: str

    def __str__(self) -> str:
        return f"{self.what}: taken away at each request: {self.left}"


@dataclass(frozen=True)
class BackedOff(Event):
    """A batch did not fit into memory; its items are tried again in smaller ones."""

    degraded: ClassVar[bool] = True

    what: str
    batch: int
    smaller: int

    def __str__(self) -> str:
        return f"{self.what}: a batch of {self.batch} ran out of memory; going on with {self.smaller}"


class EventHook(Protocol):
    """Called with each event, in the thread where it happened. It must be quick and must not raise."""

    def __call__(self, event: Event, /) -> object:
        """Receive one event."""
        ...


_lock = rlock()  # a finaliser may send an event in the middle of another one
_hooks: tuple[EventHook, ...] = ()
_logged: set[Event] = set()
# Events carry texts, so their number is not bounded by their types; the memory of "already logged" is.
_LOGGED_LIMIT = 512


def add_hook(hook: EventHook) -> Callable[[], None]:
    """Have `hook` called with every event from now on.

    Args:
        hook: A callable of one `Event`. An exception in it is logged and goes no further.

    Returns:
        A function that removes the hook again; calling it twice is harmless.

    Raises:
        TypeError: `hook` is not callable.
    """
    if not callable(hook):
        raise TypeError(f"add_hook() needs a callable of one event, got {shown(hook)}")

    # A wrapper of its own for each registration: the same hook may be added twice and removed once.
    def registration(event: Event) -> object:
        return hook(event)

    global _hooks  # noqa: PLW0603 - an immutable tuple swapped under a lock, read without one
    with _lock:
        _hooks = (*_hooks, registration)

    def remove() -> None:
        global _hooks  # noqa: PLW0603
        with _lock:
            _hooks = tuple(known for known in _hooks if known is not registration)

    return remove


def emit(event: Event) -> None:
    """Log `event` (a degradation once at WARNING) and hand it to the hooks."""
    with _lock:
        first = event.degraded and event not in _logged
        if first:
            if len(_logged) >= _LOGGED_LIMIT:
                _logged.clear()
            _logged.add(event)
        hooks = _hooks
    level = logging.INFO
    if event.degraded:
        level = logging.WARNING if first else logging.DEBUG
    if logger.isEnabledFor(level):  # names and reasons are others', and a log may be read in a terminal
        logger.log(level, "%s", printable(event))
    for hook in hooks:
        try:
            hook(event)
        except Exception:  # a broken metrics hook must not break speech
            logger.exception("an event hook raised; the event was %s", event)
