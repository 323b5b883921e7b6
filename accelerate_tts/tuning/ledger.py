"""The ledger of one tuning: what has been decided so far, and the changes that are in force."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from accelerate_tts.plan import Which

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.stages.protocol import Change

__all__ = ["AppliedChange", "Ledger", "switch_off"]


@dataclass(frozen=True)
class AppliedChange:
    """A change in force: on which part, of which stage, of which group of alternatives, and which calls were timed."""

    part: str
    stage: str
    group: str
    change: Change
    times: Which = "loop"


@dataclass
class Ledger:
    """Decisions of one tuning.

    Attributes:
        results: A line for each stage tried.
        kept: The changes in force, in the order in which they were made.
        notes: Whatever else the user should know.
        unmet: What there was no time for: what it may be hoped to gain of a pass, its part and stage, and the budget
            that it wants.
    """

    results: list[StageResult] = field(default_factory=list)
    kept: list[AppliedChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmet: list[tuple[float, str, str, float]] = field(default_factory=list)

    def kept_on(self, part: str) -> list[AppliedChange]:
        """The changes that are in force on a part."""
        return [kept for kept in self.kept if kept.part == part]

    def current(self, part: str, group: str) -> AppliedChange | None:
        """The alternative of a group that is in force on a part."""
        return next((kept for kept in self.kept_on(part) if group and kept.group == group), None)

    @property
    def compiles(self) -> bool:
        """Tell if a change in force compiles something."""
        return any(kept.change.graphs is not None for kept in self.kept)

    def enter(self, result: StageResult, change: AppliedChange | None, instead_of: AppliedChange | None = None) -> None:
        """Enter a verdict.

        Args:
            result: The verdict.
            change: What was kept, if anything was.
            instead_of: The alternative whose place it takes.
        """
        if change is not None:
            if instead_of is not None:
                self._supersede(instead_of, result)
            self.kept.append(change)
        self.results.append(result)

    def _supersede(self, slower: AppliedChange, faster: StageResult) -> None:
        self.kept.remove(slower)
        for number, result in enumerate(self.results):
            if result.kept and (result.part, result.stage) == (slower.part, slower.stage):
                self.results[number] = replace(result.dropped(f"{faster.stage} is faster still"), sure=faster.sure)

    def on(self) -> None:
        """Put every kept change in force."""
        for kept in self.kept:
            kept.change.on()

    def off(self) -> None:
        """Put the object back as it was loaded."""
        switch_off(kept.change for kept in reversed(self.kept))

    def put(self, kept: AppliedChange) -> None:
        """Put one of the kept changes in force again, where it was: below those that were made after it."""
        with self._above(kept):
            kept.change.on()

    def lift(self, kept: AppliedChange) -> None:
        """Switch one of the kept changes off, from below those that were made after it."""
        with self._above(kept):
            switch_off((kept.change,))

    @contextmanager
    def _above(self, kept: AppliedChange) -> Generator[None, None, None]:
        # A change that was made of a module's class remembers what that was; so the last one made goes first.
        above = [other.change for other in self.kept[self.kept.index(kept) + 1 :]]
        try:
            switch_off(reversed(above))
            yield
        finally:
            for change in above:
                change.on()

    def drop(
        self, reason: str, unwanted: Callable[[StageResult], bool] = lambda _result: True, *, sure: bool = True
    ) -> None:
        """Give up kept changes, all of them unless told which, and say why (and how sure) in their results."""
        self.off()
        for number, result in enumerate(self.results):
            if result.kept and unwanted(result):
                self.results[number] = replace(result.dropped(f"undone: {reason}"), sure=sure and result.sure)
        names = {(result.part, result.stage) for result in self.results if result.kept}
        self.kept[:] = [kept for kept in self.kept if (kept.part, kept.stage) in names]
        self.on()


def switch_off(changes: Iterable[Change]) -> None:
    """Switch changes off, each of them whatever becomes of the others.

    One that fails half-way (for want of memory, say) is asked once more, since `Change.off` is idempotent.

    Raises:
        Exception: The first that there was, once all have been switched off.
    """
    first: Exception | None = None
    for change in changes:
        for _ in range(2):
            try:
                change.off()
                break
            except Exception as error:  # raised below, when nothing is left to be done
                first = first or error
    if first is not None:
        raise first
