"""Who guards which object: counts its faults, switches its tuning off for a second attempt, and at last for good.

Tuning changes a model in place and in such a way that it can be switched back, and the loaded weights stay where they
are. So the untouched model is reached by switching the changes off for as long as the second attempt runs, and no
second copy is held. A call of another thread that was within the model when they were switched is made again,
untouched; one that begins meanwhile runs untouched, which is slower and as right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol

from accelerate_tts.errors import ReloadError
from accelerate_tts.events import FellBack, Guarded, NotApplied, emit
from accelerate_tts.locks import rlock
from accelerate_tts.runtime import guard
from accelerate_tts.runtime.guard import Expectation, Heard, Units

__all__ = [
    "Guard",
    "Guarding",
    "Guards",
    "Listener",
    "Switch",
    "Watcher",
    "guard_of",
    "listening",
    "protect",
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
    """

    def __init__(self, what: str, switch: Switch, expected: Mapping[str, Expectation], limit: int) -> None:
        self._what = what
        self._switch = weakref.ref(switch)
        self._expected = expected
        self._limit = limit
        # Taken again by the same thread where the collector closes an abandoned stream while changes are switched.
        self._lock = rlock()
        self._held = 0
        self.switched = 0
        self._faults = 0
        self._own: dict[tuple[str, str], int] = {}
        self.retired = False

    @property
    def in_force(self) -> bool:
        """Whether there is anything to guard against."""
        return not self.retired and self._switch() is not None

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> str | None:
        """See `Watcher.judge`. A fault that the untouched model was seen to have too, `limit` times, is not told."""
        fault = guard.fault_of(heard, units, self._expected.get(name, guard.UNKNOWN), whole=whole)
        return None if fault is None or self._own.get((name, fault), 0) >= self._limit else fault

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """Switch the changes off while open: the first of several threads does, the last one switches them on.

        Raises:
            ReloadError: The loaded weights were let go, and cannot be loaded again; nothing is switched then.
        """
        _pin = self.at_hand()  # held; and before the lock, since it may take as long as a load
        self._hold(1)
        nested = _retrying.get()
        _retrying.set(True)
        try:
            yield
        finally:
            _retrying.set(nested)  # not by its token: a generator may be closed in another context
            self._hold(-1)

    def at_hand(self) -> object:
        """Have the loaded weights for as long as what is returned lives.

        Raises:
            ReloadError: As for `untouched`.
        """
        switch = self._switch()
        return None if switch is None else switch.at_hand()

    def _hold(self, more: int) -> None:
        with self._lock:
            before, self._held = self._held, self._held + more
            switch = self._switch()
            if switch is None or self.retired:
                return
            try:
                if before == 0:
                    self._turn(switch.off)
                elif self._held == 0:
                    self._turn(switch.on)
            except BaseException:
                self._held -= more
                raise

    def _turn(self, switch: Callable[[], None]) -> None:
        # Before and after: a call that begins in the middle of it has seen half of the changes, too.
        self.switched += 1
        try:
            switch()
        finally:
            self.switched += 1

    def retire(self) -> None:
        """Put the object back as it was loaded, for good: a retry that still runs will not switch it on again.

        Raises:
            ReloadError: As for `untouched`.
        """
        switch = self._switch()
        if switch is not None:
            switch.keep_loaded()
        with self._lock:
            self.retired = True
            if switch is not None:
                self._turn(switch.off)

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
                self.retire()
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

    @property
    def switched(self) -> int:
        """How often the changes of any were switched."""
        return sum(guarding.switched for guarding in self._guards)

    def judge(self, name: str, units: Units, heard: Heard, *, whole: bool) -> str | None:
        """See `Watcher.judge`."""
        judged = (guarding.judge(name, units, heard, whole=whole) for guarding in self._guards)
        return next((fault for fault in judged if fault is not None), None)

    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        """See `Guard.untouched`."""
        with ExitStack() as scopes:
            for guarding in self._guards:
                scopes.enter_context(guarding.untouched())
            yield

    def at_hand(self) -> object:
        """See `Guard.at_hand`."""
        return [guarding.at_hand() for guarding in self._guards]

    def own(self, name: str, fault: str) -> None:
        """See `Guard.own`."""
        for guarding in self._guards:
            guarding.own(name, fault)

    def count(self, name: str, fault: str, outcome: str) -> None:
        """See `Guard.count`."""
        for guarding in self._guards:
            guarding.count(name, fault, outcome)


Guarding = Guard | Guards

# By the identity of objects, without keeping them: a guard refers to nothing that keeps a model alive.
_guards: dict[int, tuple[weakref.ref[Any], tuple[Guard, ...]]] = {}
# By context: what other threads and tasks call meanwhile, of other objects, is no part of the warm-up.
_listener: ContextVar[Listener | None] = ContextVar("accelerate_tts_listener", default=None)
# A function inside a second attempt is not made again by itself; the whole attempt is untouched.
_retrying: ContextVar[bool] = ContextVar("accelerate_tts_retrying", default=False)


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


def watcher_of(instance: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watcher | None:
    """Who watches a call: the guard of the object whose method it is, of an argument, or of what the object holds."""
    if _guards and not _retrying.get():
        items = (instance, *args, *kwargs.values(), *getattr(instance, "__dict__", {}).values())
        found = {id(one): one for item in items for one in guards_of(item) if one.in_force}
        if found:
            guards = tuple(found.values())
            return guards[0] if len(guards) == 1 else Guards(guards)
    return _listener.get()
