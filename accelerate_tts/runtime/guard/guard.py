"""Who guards which object: counts its faults, switches its tuning off for a second attempt, and at last for good.

Tuning changes a model in place and in such a way that it can be switched back, and the loaded weights stay where they
are. So the untouched model is reached by switching the changes off for as long as the second attempt runs, and no
second copy is held. They are switched while no other call is inside (`gate`); one that begins meanwhile runs untouched,
which is slower and as right.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from accelerate_tts.errors import ReloadError
from accelerate_tts.events import FellBack, Guarded, NotApplied, emit
from accelerate_tts.locks import rlock
from accelerate_tts.runtime.guard import checks
from accelerate_tts.runtime.guard.checks import Expectation, Heard, Units
from accelerate_tts.runtime.guard.gate import PATIENCE, WITHIN, Gate, Hold, Step

__all__ = [
    "Guard",
    "Guarding",
    "Guards",
    "Holds",
    "Listener",
    "Switch",
    "Watcher",
    "guard_of",
    "is_watched",
    "listening",
    "not_again",
    "protect",
    "retrying",
    "watcher_of",
]

_OWN = "the untouched model gives the same, so this is what was given"


class Switch(Protocol):
    """What a guard switches: a tuning."""

    def on(self) -> None:
        """Put every change in force."""
        ...

    def off(self) -> None:
        """Put the object back as it was loaded."""
        ...

    def at_hand(self) -> object:
        """Have what `off` needs for as long as what is returned lives; ReloadError if it cannot be had."""
        ...

    def keep_loaded(self) -> None:
        """Have what `off` needs from now on; likewise."""
        ...


class Watcher(Protocol):
    """Whoever is told what the calls of an object gave."""

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> str | None:
        """What is wrong with an output of the function of this name, or `None`."""
        ...


class Listener:
    """Learns from the untouched model's calls what to expect of each function."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[Units, Heard]]] = {}

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> None:
        """See `Watcher.judge`. Nothing is wrong with the reference."""
        if whole:
            self._calls.setdefault(name, []).append((units, heard))

    @property
    def expected(self) -> dict[str, Expectation]:
        """What to expect, by the name of the function."""
        return {name: Expectation.of(calls) for name, calls in self._calls.items()}


class Guard:
    """Guards what is called of one tuned object.

    Args:
        what: The object's name in events.
        switch: Its tuning. Referred to weakly, since it refers to the model.
        expected: What the untouched object gave for the warm-up, by function.
        limit: Faults after which the tuning is put back for good.
        patience: Seconds that a switch waits for calls that are under way, and calls for a switch.
    """

    def __init__(
        self,
        what: str,
        switch: Switch,
        expected: Mapping[str, Expectation],
        limit: int,
        patience: float = PATIENCE,
    ) -> None:
        self._what = what
        self._switch = weakref.ref(switch)
        self._expected = expected
        self._limit = limit
        self._lock = rlock()
        self._gate = Gate(self._on, self._off, patience, self._stays_off)
        self._faults = 0
        self._own: dict[tuple[str, str], int] = {}

    @property
    def in_force(self) -> bool:
        """Whether there is anything to guard against."""
        return not self.retired and self._switch() is not None

    @property
    def retired(self) -> bool:
        """Whether the object was put back for good."""
        return self._gate.over

    @property
    def held(self) -> int:
        """How many second attempts need the object untouched now."""
        return self._gate.held

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> str | None:
        """See `Watcher.judge`. A fault that the untouched model was seen to have too, `limit` times, is not told."""
        fault = checks.fault_of(heard, units, self._expected.get(name, checks.UNKNOWN), whole=whole)
        return None if fault is None or self._own.get((name, fault), 0) >= self._limit else fault

    def enter(self, step: Step, *, wait: bool) -> None:
        """A call is about to be inside the object. While that is being switched, it waits."""
        self._gate.enter(step, wait=wait)

    async def ready(self) -> None:
        """Wait as a coroutine until the object is not being switched."""
        await self._gate.ready()

    def leave(self, step: Step) -> None:
        """The call is not inside any more. Harmless a second time."""
        self._gate.leave(step)

    def hold(self, *, force: bool = False) -> Hold:
        """Have the object untouched until what is returned is released or collected.

        Args:
            force: After `patience`, switch it under the feet of the calls that are under way.

        Raises:
            ReloadError: The loaded weights were let go, and cannot be loaded again; nothing is switched then.
            BusyError: There was no gap between other calls, and `force` is off; likewise.
        """
        return self._gate.hold(self._at_hand(), force=force)  # before its lock, since it may take as long as a load

    async def hold_later(self) -> Hold:
        """`hold`, as a coroutine."""
        return await self._gate.hold_later(self._at_hand())

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Switch the changes off while open, whoever calls meanwhile: the first of several does, the last one back on.

        Raises:
            ReloadError: As for `hold`.
        """
        with self.hold(force=True), retrying():
            yield

    def _at_hand(self) -> object:
        switch = self._switch()
        return None if switch is None else switch.at_hand()

    def _on(self) -> None:
        switch = self._switch()
        if switch is not None:
            switch.on()

    def _off(self) -> None:
        switch = self._switch()
        if switch is not None:
            switch.off()

    def _stays_off(self, why: str) -> None:
        emit(FellBack(self._what, "everything", why))

    def retire(self, *, wait: bool = True) -> None:
        """Put the object back as it was loaded, for good: a retry that still runs will not switch it on again.

        Args:
            wait: Wait for calls that are under way, for `patience` at most; else it is done as soon as there are none.

        Raises:
            ReloadError: As for `hold`.
        """
        switch = self._switch()
        if switch is not None:
            switch.keep_loaded()
        self._gate.end(wait=wait)

    def own(self, name: str, fault: str) -> None:
        """The untouched model has this fault, too."""
        with self._lock:
            self._own[name, fault] = self._own.get((name, fault), 0) + 1
        emit(Guarded(self._what, name, fault, _OWN))

    def count(self, name: str, fault: str, outcome: str) -> None:
        """A fault that is ours, as far as anybody can know; after the last that is borne the tuning is put back."""
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


class Guards:
    """All guards of one call, as of a model and a vocoder that were loaded one after the other.

    Nobody can tell whose fault it was: the second attempt is without the changes of any, and counts for each.
    """

    def __init__(self, guards: tuple[Guard, ...]) -> None:
        self._guards = guards

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> str | None:
        """See `Watcher.judge`."""
        judged = (guarding.judge(name, units, heard, whole=whole) for guarding in self._guards)
        return next((fault for fault in judged if fault is not None), None)

    def enter(self, step: Step, *, wait: bool) -> None:
        """See `Guard.enter`."""
        for guarding in self._guards:
            guarding.enter(step, wait=wait)

    async def ready(self) -> None:
        """See `Guard.ready`."""
        for guarding in self._guards:
            await guarding.ready()

    def leave(self, step: Step) -> None:
        """See `Guard.leave`."""
        for guarding in self._guards:
            guarding.leave(step)

    def hold(self) -> Holds:
        """See `Guard.hold`."""
        return Holds([guarding.hold() for guarding in self._guards])  # one that raises has those before it collected

    async def hold_later(self) -> Holds:
        """See `Guard.hold_later`."""
        return Holds([await guarding.hold_later() for guarding in self._guards])

    def own(self, name: str, fault: str) -> None:
        """See `Guard.own`."""
        for guarding in self._guards:
            guarding.own(name, fault)

    def count(self, name: str, fault: str, outcome: str) -> None:
        """See `Guard.count`."""
        for guarding in self._guards:
            guarding.count(name, fault, outcome)


class Holds:
    """Several objects, untouched until this is released."""

    def __init__(self, holds: list[Hold]) -> None:
        self._holds = holds

    def release(self) -> None:
        """See `Hold.release`."""
        for hold in self._holds:
            hold.release()


Guarding = Guard | Guards

# By the identity of objects, without keeping them: a guard refers to nothing that keeps a model alive.
_guards: dict[int, tuple[weakref.ref[Any], tuple[Guard, ...]]] = {}
# By context: what other threads and tasks call meanwhile, of other objects, is no part of the warm-up.
_listener: ContextVar[Listener | None] = ContextVar("accelerate_tts_listener", default=None)
# A function inside a second attempt is not made again by itself; the whole attempt is untouched.
_retrying: ContextVar[bool] = ContextVar("accelerate_tts_retrying", default=False)
# What is called more deeply is looked at as a part of what called it: recursion has a limit.
_DEEPEST = 16


@contextmanager
def retrying() -> Generator[None, None, None]:
    """While open, nothing that is called in this context is guarded by itself."""
    before = _retrying.get()
    _retrying.set(True)
    try:
        yield
    finally:
        _retrying.set(before)  # not by a token: a generator may be closed in another context


def not_again(name: str) -> None:
    """Say that the calls which the present code is a part of must not be made again: a function has side effects."""
    for step in WITHIN.get():
        step.obstacle = f"it called {name}, which has retry=False"


def protect(item: object, guarding: Guard) -> None:
    """Guard the `@inference` calls of an object, or that are given it; one that takes no weak reference is passed over.

    An object that holds several tuned ones has a guard for each.
    """
    number = id(item)
    others = tuple(known for known in guards_of(item) if known.in_force and known is not guarding)

    def gone(reference: object) -> None:
        entry = _guards.get(number)
        if entry is not None and entry[0] is reference:
            del _guards[number]

    with suppress(TypeError):
        _guards[number] = (weakref.ref(item, gone), (*others, guarding))


@contextmanager
def listening() -> Generator[Listener, None, None]:
    """While open, learn from the calls of `@inference` functions in this context, and in those begun from it."""
    listener = Listener()
    token = _listener.set(listener)
    try:
        yield listener
    finally:
        _listener.reset(token)


def guards_of(item: object) -> tuple[Guard, ...]:
    """The guards of an object, the last one last."""
    entry = _guards.get(id(item))
    return entry[1] if entry is not None and entry[0]() is item else ()


def guard_of(item: object) -> Guard | None:
    """The last guard of an object, if it has one; a tuning has no other."""
    guards = guards_of(item)
    return guards[-1] if guards else None


def is_watched() -> bool:
    """Whether calls in this context may have somebody who watches them."""
    if _retrying.get() or len(WITHIN.get()) >= _DEEPEST:
        return False
    return bool(_guards) or _listener.get() is not None


def watcher_of(instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watcher | None:
    """Who watches a call: the guard of the object whose method it is, of an argument, or of what the object holds."""
    if _guards and is_watched():
        items = (instance, *args, *kwargs.values(), *getattr(instance, "__dict__", {}).values())
        found = {id(one): one for item in items for one in guards_of(item) if one.in_force}
        if found:
            guards = tuple(found.values())
            return guards[0] if len(guards) == 1 else Guards(guards)
    return _listener.get()
