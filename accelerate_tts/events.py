"""Events: frozen dataclasses that are sent to hooks and logged.

A degradation (a fallback, a failed warm-up, a setting that came too late) is never silent. It is an `Event` with
`degraded = True`, logged at WARNING the first time and at DEBUG afterwards. Hooks receive every event, so a metrics
system can count them without a dependency of this library::

    remove = accelerate_tts.add_hook(lambda event: counter.labels(type(event).__name__).inc())
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from accelerate_tts.errors import printable, shown
from accelerate_tts.locks import rlock

logger = logging.getLogger("accelerate_tts")


@dataclass(frozen=True)
class Event:
    """Base class of events. `str(event)` is the logged line; `class Name(Event, degraded=True)` is a degradation."""

    degraded: ClassVar[bool] = False

    def __init_subclass__(cls, *, degraded: bool = False) -> None:
        cls.degraded = cls.degraded or degraded


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
    """A stage is about to be tried on a part, which may take seconds."""

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
    """An object was restored from a warm pack, without tuning."""

    what: str
    kept: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}: {self.kept} optimisations from a warm pack, checked and ready in {self.seconds:.1f} s"


@dataclass(frozen=True)
class TunedUnderLoad(Event, degraded=True):
    """An object was tuned while other programs used the machine. A later load tries uncertain verdicts again.

    Attributes:
        what: The tuned object.
        reason: The other programs and the resources that they used.
        unsure: Number of uncertain verdicts, on any stage.
        tried: Number of all verdicts.
    """

    what: str
    reason: str
    unsure: int
    tried: int

    def __str__(self) -> str:
        return f"{self.what}: {self.unsure} of {self.tried} verdicts are uncertain, since {self.reason}"


@dataclass(frozen=True)
class BudgetTooSmall(Event, degraded=True):
    """The time budget was too small for the most promising stage.

    Attributes:
        what: The part of the tuned object.
        stage: The optimisation that was not tried, or not timed.
        seconds: The budget in seconds (`tune_seconds`).
        wants: Approximate budget in seconds with which it would have been tried.
    """

    what: str
    stage: str
    seconds: float
    wants: float

    def __str__(self) -> str:
        return f"{self.what}: {self.stage} needs tune_seconds of about {self.wants:.0f}, had {self.seconds:g}"


@dataclass(frozen=True)
class Retuned(Event):
    """Uncertain verdicts of an earlier process on a busy machine were tried again, and the warm pack was updated.

    Attributes:
        what: The tuned object.
        tried: Number of uncertain verdicts.
        unsure: Number of verdicts that are still uncertain.
        before: End-to-end speed-up that the earlier process measured.
        ratio: End-to-end speed-up now.
    """

    what: str
    tried: int
    unsure: int
    before: float
    ratio: float

    def __str__(self) -> str:
        again = f", {self.unsure} are still uncertain" if self.unsure else ""
        return (
            f"{self.what}: {self.tried} verdicts of a busy machine tried again{again};"
            f" {self.before:.2f}x before, {self.ratio:.2f}x now"
        )


@dataclass(frozen=True)
class Undone(Event):
    """The optimisations of an object were undone on request."""

    what: str

    def __str__(self) -> str:
        return f"{self.what}: back to the untouched model"


@dataclass(frozen=True)
class Recompiled(Event, degraded=True):
    """A compiled part got an input that the warm-up did not cover, and was compiled again in service."""

    what: str
    graphs: int
    shapes: str
    guard: str = ""

    def __str__(self) -> str:
        why = f", since {self.guard} does not hold" if self.guard else ""
        return f"{self.what}: recompiled in service for {self.shapes}{why} (graph {self.graphs}); warm up with one"


@dataclass(frozen=True)
class FellBack(Event, degraded=True):
    """An optimisation could not be used; the untouched model is used instead."""

    what: str
    stage: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.stage} is off, the untouched model is used: {self.reason}"


@dataclass(frozen=True)
class Guarded(Event, degraded=True):
    """A faulty output was detected in service.

    Attributes:
        what: The tuned object.
        function: The `@inference` function.
        fault: "NaN or Inf", "silent", "clipped flat" or "too long".
        outcome: Description of the output that the caller got.
        count: Number of the object's faults that are attributed to its tuning, this one included; 0 if this one is not.
    """

    what: str
    function: str
    fault: str
    outcome: str
    count: int = 0

    def __str__(self) -> str:
        number = f" (fault {self.count})" if self.count else ""
        return f"{self.what}: the output of {self.function} was {self.fault}{number}; {self.outcome}"


@dataclass(frozen=True)
class WarmupFailed(Event, degraded=True):
    """A warm-up pass raised an exception; the object stays as loaded."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: warm-up failed, nothing was optimised: {self.reason}"


@dataclass(frozen=True)
class NotApplied(Event, degraded=True):
    """A setting or a feature had no effect. The reason says why."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} was not applied: {self.reason}"


@dataclass(frozen=True)
class PackIgnored(Event, degraded=True):
    """A warm pack or a file of it could not be read or written; its work is repeated."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} was ignored: {self.reason}"


@dataclass(frozen=True)
class Tidied(Event):
    """Left-over state of upstream was removed, and will be at each request."""

    what: str
    left: str

    def __str__(self) -> str:
        return f"{self.what}: removed at each request: {self.left}"


@dataclass(frozen=True)
class BackedOff(Event, degraded=True):
    """A batch did not fit into memory; its items, or those of the next call, are tried in smaller batches."""

    what: str
    batch: int
    smaller: int

    def __str__(self) -> str:
        return f"{self.what}: a batch of {self.batch} ran out of memory; going on with {self.smaller}"


@dataclass(frozen=True)
class FirstAudio(Event):
    """The first piece of a stream is there.

    Attributes:
        what: The system that speaks.
        seconds: Seconds since the stream was first asked for a piece.
        samples: Samples of the piece.
    """

    what: str
    seconds: float
    samples: int

    def __str__(self) -> str:
        return f"{self.what}: first audio after {self.seconds:.2f} s ({self.samples} samples)"


@dataclass(frozen=True)
class DecodePasses(Event):
    """Decode steps of callers that may share passes over a decoder's weights. Sent when a call ends.

    Attributes:
        what: The decoder.
        passes: Passes since the last such event, of this call and of others.
        steps: Decode steps of single callers in them.
        rows: Rows in them. A step of one caller has several with guidance or a batch.
    """

    what: str
    passes: int
    steps: int
    rows: int

    def __str__(self) -> str:
        rows = f"{self.rows / self.passes:.2f} rows in each"
        return f"{self.what}: {self.steps} decode steps in {self.passes} passes, {rows}"


class EventHook(Protocol):
    """Callable for events. It is called on the thread of the event, and must be quick and not raise."""

    def __call__(self, event: Event, /) -> object:
        """Receive one event."""
        ...


_lock = rlock()  # reentrant: a finaliser may emit an event during another one
_hooks: tuple[EventHook, ...] = ()
_logged: set[Event] = set()
# Events contain texts, so the number of different events is unbounded; the set of logged ones is bounded.
_LOGGED_LIMIT = 512


def add_hook(hook: EventHook) -> Callable[[], None]:
    """Call `hook` with every event from now on.

    Args:
        hook: A callable of one `Event`. Its exceptions are logged and not raised.

    Returns:
        A function that removes the hook. It is idempotent.

    Raises:
        TypeError: `hook` is not callable.
    """
    if not callable(hook):
        raise TypeError(f"add_hook() needs a callable of one event, got {shown(hook)}")

    # A separate wrapper for each registration, since the same hook may be added twice and removed once.
    registration = partial(hook)
    _register(registration)
    return partial(_forget, registration)


def _register(registration: EventHook) -> None:
    global _hooks  # noqa: PLW0603 - an immutable tuple swapped under a lock, read without one
    with _lock:
        _hooks = (*_hooks, registration)


def _forget(registration: EventHook) -> None:
    global _hooks  # noqa: PLW0603
    with _lock:
        _hooks = tuple(known for known in _hooks if known is not registration)


@contextmanager
def hooked(hook: EventHook) -> Generator[None, None, None]:
    """Call `hook` with every event while open. See `add_hook`."""
    registration = partial(hook)
    try:
        _register(registration)
        yield
    finally:
        try:
            _forget(registration)
        except BaseException:  # Ctrl-C in it
            _forget(registration)
            raise


def logged_count() -> int:
    """Return the number of different degradations that are remembered as logged."""
    return len(_logged)


@contextmanager
def isolated() -> Generator[None, None, None]:
    """Begin without hooks and without logged events, as in a new process, and put both back at the end. For tests."""
    global _hooks, _logged
    with _lock:
        before, _hooks, _logged = (_hooks, _logged), (), set()
    try:
        yield
    finally:
        with _lock:
            _hooks, _logged = before


def emit(event: Event) -> None:
    """Log `event` (a degradation once at WARNING) and pass it to the hooks."""
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
    if logger.isEnabledFor(level):  # names and reasons are foreign texts, and a log may be shown in a terminal
        with suppress(Exception):  # a filter or handler of the user's must not break speech
            logger.log(level, "%s", printable(event))
    for hook in hooks:
        try:
            hook(event)
        except Exception:  # a broken metrics hook must not break speech
            with suppress(Exception):
                logger.exception("an event hook raised; the event was %s", event)


class Lasting:
    """Sends events about what lasts, such as a kind of call that no graph serves: each once, not at every call.

    Args:
        most: Maximum number of different events. Their texts are foreign, and may contain a number that always differs.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._sent: set[Event] = set()

    def emit(self, event: Event) -> None:
        """Emit an event that was not emitted before."""
        if event not in self._sent and len(self._sent) < self._most:
            self._sent.add(event)
            emit(event)
