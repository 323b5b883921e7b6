"""Base classes of reversible changes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from accelerate_tts.events import FellBack, Lasting, Recompiled, emit


class BaseChange(ABC):
    """Base class of changes that compile nothing."""

    @property
    def graphs(self) -> int | None:
        """Number of compiled graphs; `None`, since nothing is compiled."""
        return None

    @abstractmethod
    def on(self) -> None:
        """Switch the change on. Idempotent."""

    @abstractmethod
    def off(self) -> None:
        """Put the part back exactly as it was. Idempotent."""

    def end_warmup(self) -> None:  # noqa: B027 - most changes need none
        """Do nothing, since nothing is compiled."""


class Changes(BaseChange):
    """Several changes as one: switched on in their order, and off in reverse.

    Args:
        changes: The changes. `None` is skipped.
    """

    def __init__(self, *changes: BaseChange | None) -> None:
        self._changes = [change for change in changes if change is not None]

    def on(self) -> None:
        """Switch the changes on. Idempotent, as they are."""
        for change in self._changes:
            change.on()

    def off(self) -> None:
        """Switch the changes off."""
        for change in reversed(self._changes):
            change.off()


class Counter:
    """Counts graphs. Separate from the change, since dynamo keeps the backend and its references alive.

    Args:
        what: The part's name in events.

    Attributes:
        graphs: Graphs so far.
        sealed: True once the warm-up has ended.
        guard: The reason for the last graph: the guard that failed, for inductor's.
        left_out: True if the compiler left a call out.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.graphs = 0
        self.sealed = False
        self.left_out = False
        self.guard = ""
        self._unserved = Lasting()

    def count(self, shapes: str) -> None:
        """Count a graph for inputs of these shapes; emit an event after warm-up."""
        self.graphs += 1
        if self.sealed:
            emit(Recompiled(self.what, self.graphs, shapes, self.guard))

    def unserved(self, stage: str, reason: str) -> None:
        """Report a kind of call that no graph serves: once, since none will, and a token may make it for each block."""
        self._unserved.emit(FellBack(self.what, stage, reason))


class CountedChange(BaseChange):
    """Base class of changes that compile or record graphs. Subclasses set `_counter`."""

    _counter: Counter

    @property
    def graphs(self) -> int | None:
        """Number of graphs compiled or recorded so far."""
        return self._counter.graphs

    def end_warmup(self) -> None:
        """Emit an event for each graph from now on."""
        self._counter.sealed = True
