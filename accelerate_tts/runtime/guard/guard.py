"""Guards of tuned objects: count faults, switch tuning off for a second attempt, and finally for good.

Tuning changes a model in place and reversibly, and keeps the loaded weights. The untouched model is therefore reached
by switching the changes off while the second attempt runs, without a second copy of the model. They are switched while
no other call is inside (`gate`). A call that begins meanwhile runs untouched, which is slower and equally correct.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from accelerate_tts.errors import ReloadError
from accelerate_tts.events import FellBack, Guarded, NotApplied, emit
from accelerate_tts.identity_map import IdentityMap
from accelerate_tts.inspection.object_tree import members_of
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.guard import checks
from accelerate_tts.runtime.guard.checks import AudioStats, Expectation, Units
from accelerate_tts.runtime.guard.gate import PATIENCE, WITHIN, Gate, Hold, Step

_OWN = "the untouched model's output has the same fault, and was returned"


class Switch(Protocol):
    """A tuning, as a guard switches it on and off."""

    def on(self) -> None:
        """Switch every change on."""
        ...

    def off(self) -> None:
        """Put the object back as it was loaded."""
        ...

    def at_hand(self) -> object:
        """Load what `off` needs and keep it as long as the returned object lives; ReloadError if that fails."""
        ...

    def keep_loaded(self) -> None:
        """Load what `off` needs and keep it for good; ReloadError if that fails."""
        ...


class _NoSwitch:
    """The switch of an object that is gone. There is nothing to switch."""

    def on(self) -> None:
        """See `Switch.on`."""

    def off(self) -> None:
        """See `Switch.off`."""

    def at_hand(self) -> None:
        """See `Switch.at_hand`."""

    def keep_loaded(self) -> None:
        """See `Switch.keep_loaded`."""


_NO_SWITCH = _NoSwitch()


class Judge(Protocol):
    """Receives the statistics of the outputs of an object's calls."""

    def judge(self, name: str, units: Units, stats: AudioStats, *, whole: bool) -> str | None:
        """Return the fault of an output of the named function, or `None`."""
        ...


class Listener:
    """Learns the expected outputs of each function from the untouched model's calls."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[Units, AudioStats]]] = {}

    def judge(self, name: str, units: Units, stats: AudioStats, *, whole: bool) -> None:
        """See `Judge.judge`. The reference has no faults."""
        if whole:
            self._calls.setdefault(name, []).append((units, stats))

    @property
    def expected(self) -> dict[str, Expectation]:
        """Expectations by the name of the function."""
        return {name: Expectation.of(calls) for name, calls in self._calls.items()}


class Guard:
    """Guards the calls of one tuned object.

    Args:
        what: The object's name in events.
        switch: Its tuning, held by a weak reference, since it refers to the model.
        expected: Expected outputs by function, from the untouched object's warm-up.
        limit: Number of faults after which the tuning is undone for good.
        patience: Seconds that a switch waits for running calls, and calls for a switch.

    Attributes:
        gate: Calls of the object register here while they are inside it.
    """

    def __init__(
        self, what: str, switch: Switch, expected: Mapping[str, Expectation], limit: int, patience: float = PATIENCE
    ) -> None:
        self._what = what
        self._tuning = weakref.ref(switch)
        self._expected = expected
        self._limit = limit
        self._lock = rlock()
        self.gate = Gate(
            lambda: self._switch.on(),  # noqa: PLW0108 - the object may be gone by then
            lambda: self._switch.off(),  # noqa: PLW0108
            patience,
            lambda why: emit(FellBack(what, "everything", why)),
        )
        self._faults = 0
        self._own: dict[tuple[str, str], int] = {}

    @property
    def in_force(self) -> bool:
        """True while the object is tuned: the guard is not retired and the tuning is alive."""
        return not self.retired and self._switch is not _NO_SWITCH

    @property
    def _switch(self) -> Switch:
        switch = self._tuning()
        return _NO_SWITCH if switch is None else switch

    @property
    def retired(self) -> bool:
        """True if the tuning was undone for good."""
        return self.gate.over

    @property
    def held(self) -> int:
        """Number of second attempts that need the object untouched now."""
        return self.gate.held

    def judge(self, name: str, units: Units, stats: AudioStats, *, whole: bool) -> str | None:
        """See `Judge.judge`. A fault that the untouched model has shown `limit` times is ignored."""
        fault = checks.fault_of(stats, units, self._expected.get(name, checks.UNKNOWN), whole=whole)
        return None if fault is None or self._own.get((name, fault), 0) >= self._limit else fault

    def hold(self, *, force: bool = False) -> Hold:
        """Keep the object untouched until the returned object is released or collected.

        Args:
            force: After `patience`, switch even while other calls are running.

        Raises:
            ReloadError: The loaded weights were freed and cannot be reloaded. Nothing is switched then.
            BusyError: There was no gap between other calls, and `force` is off. Nothing is switched then.
        """
        at_hand = self._switch.at_hand()  # outside the gate's lock, since it may take long
        return self.gate.hold(at_hand, force=force)

    async def hold_later(self) -> Hold:
        """Like `hold`, as a coroutine."""
        return await self.gate.hold_later(self._switch.at_hand())

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Switch the changes off while open. Of several users, the first switches off and the last on again.

        Raises:
            ReloadError: As for `hold`.
        """
        with self.hold(force=True), retrying():
            yield

    def retire(self, *, wait: bool = True) -> None:
        """Put the object back as it was loaded, for good. A retry that still runs will not switch it on again.

        Args:
            wait: Wait for running calls, at most `patience`; otherwise switch as soon as none is running.

        Raises:
            ReloadError: As for `hold`.
        """
        self._switch.keep_loaded()
        self.gate.end(wait=wait)

    def own(self, name: str, fault: str) -> None:
        """Count a fault that the untouched model has, too."""
        with self._lock:
            self._own[name, fault] = self._own.get((name, fault), 0) + 1
        emit(Guarded(self._what, name, fault, _OWN))

    def count(self, name: str, fault: str, outcome: str) -> None:
        """Count a fault of the tuning. At `limit` faults the tuning is undone for good."""
        with self._lock:
            self._faults += 1
            faults = self._faults
        emit(Guarded(self._what, name, fault, outcome, faults))
        if faults == self._limit:
            try:
                self.retire(wait=False)
            except ReloadError as error:
                emit(NotApplied(f"putting {self._what} back after {faults} faults", str(error)))
                return
            emit(FellBack(self._what, "everything", f"faulty output {faults} times, the last of them {fault}"))


known_guards = IdentityMap[tuple[Guard, ...]]()
"""Guards of objects, newest last."""
# A context variable: calls of other threads and tasks are no part of the warm-up.
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("accelerate_tts_listeners", default=())
# A call inside a second attempt is not retried by itself; the whole attempt runs untouched.
_retrying: ContextVar[bool] = ContextVar("accelerate_tts_retrying", default=False)
# Nesting depth up to which calls are checked; deeper ones are checked as a part of their caller's output.
_DEEPEST = 16


@contextmanager
def retrying() -> Generator[None, None, None]:
    """Switch guards off in this context while open."""
    before = _retrying.get()
    try:
        _retrying.set(True)
        yield
    finally:
        _retrying.set(before)  # no token: a generator may be closed in another context


def not_again(name: str) -> None:
    """Forbid a retry of all enclosing guarded calls, since a function with side effects was called."""
    for step in WITHIN.get():
        step.obstacle = f"it called {name}, which has retry=False"


def differs_again(reason: str) -> None:
    """Forbid a second attempt of all enclosing guarded calls, since it would not repeat the first.

    Args:
        reason: A clause for the event that a faulty output causes.
    """
    for step in WITHIN.get():
        step.differs = reason


def protect(item: object, guarding: Guard) -> None:
    """Guard the `@inference` calls that are methods of an object or take it as an argument.

    An object without support for weak references is skipped. An object that holds several tuned ones has a guard for
    each.
    """
    others = tuple(known for known in guards_of(item) if known.in_force and known is not guarding)
    with suppress(TypeError):
        known_guards.put(item, (*others, guarding))


@contextmanager
def inside_all() -> Generator[None, None, None]:
    """Scope of work beside a call, such as a thread of its own: no tuned object is switched meanwhile."""
    gates = {id(guard.gate): guard.gate for _, guards in known_guards.items() for guard in guards if guard.in_force}
    step = Step()
    try:
        for gate in gates.values():
            gate.enter(step, wait=True)
        with step.entered():
            yield
    finally:
        for gate in gates.values():
            gate.leave(step)


@contextmanager
def listening() -> Generator[Listener, None, None]:
    """Learn from `@inference` calls in this context, and in contexts copied from it, while open."""
    listener = Listener()
    before = _listeners.get()
    try:
        _listeners.set((listener,))
        yield listener
    finally:
        _listeners.set(before)  # no token: see `retrying`


def guards_of(item: object) -> tuple[Guard, ...]:
    """Return the guards of an object, newest last."""
    return known_guards.get(item) or ()


def guard_of(item: object) -> Guard | None:
    """Return the newest guard of an object, or `None`. A tuned object has one."""
    guards = guards_of(item)
    return guards[-1] if guards else None


def is_watched() -> bool:
    """Check that calls in this context may have a watcher."""
    if _retrying.get() or len(WITHIN.get()) >= _DEEPEST:
        return False
    return bool(known_guards or _listeners.get())


def _held_by(instance: object) -> Iterable[Any]:
    """Return the values of an object's attributes; slots only where the object cannot be known itself."""
    if instance is None or type(instance).__weakrefoffset__:
        return getattr(instance, "__dict__", {}).values()
    return [value for _, value in members_of(instance)]


def watchers_of(instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Judge, ...]:
    """Return the watchers of a call.

    Guards are looked up for the object whose method it is, its attributes, and the arguments. A call may have several,
    for example of a model and a vocoder that were loaded separately. A fault cannot be attributed to one of them, so
    the second attempt runs without all their changes and counts for each.
    """
    if known_guards and is_watched():
        items = (instance, *args, *kwargs.values(), *_held_by(instance))
        found = {id(one): one for item in items for one in guards_of(item) if one.in_force}
        if found:
            return tuple(found.values())
    return _listeners.get()
