"""The ledger of one tuning: what has been decided so far, and the changes that are in force."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from accelerate_tts.plan import TimedCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from accelerate_tts.receipts.receipt import StageResult
    from accelerate_tts.stages.protocol import Change


@dataclass(frozen=True)
class AppliedChange:
    """A change that is kept: its part, stage, group of alternatives, and the calls that were timed."""

    part: str
    stage: str
    group: str
    change: Change
    times: TimedCalls = "loop"


@dataclass
class Ledger:
    """Decisions of one tuning.

    Attributes:
        results: A line for each stage tried.
        kept: The changes in force, in the order in which they were made.
        notes: Further remarks for the user.
        unmet: Stages without time: expected gain of a pass, part, stage, and the budget that it needs.
        displaced: The slower alternative whose place a change took, with its verdict, by part and stage of that change.
    """

    results: list[StageResult] = field(default_factory=list)
    kept: list[AppliedChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmet: list[tuple[float, str, str, float]] = field(default_factory=list)
    displaced: dict[tuple[str, str], tuple[AppliedChange, StageResult]] = field(default_factory=dict)

    def kept_on(self, part: str) -> list[AppliedChange]:
        """Return the changes that are on for a part."""
        return [kept for kept in self.kept if kept.part == part]

    def current(self, part: str, group: str) -> AppliedChange | None:
        """Return the kept alternative of a group on a part."""
        return next((kept for kept in self.kept_on(part) if group and kept.group == group), None)

    def seconds_now(self, part: str) -> float | None:
        """Return the seconds of a replay of a part with the changes kept on it; `None` if none was timed by replays."""
        stages = {kept.stage for kept in self.kept_on(part) if kept.times == "loop"}
        kept = [result for result in self.results if result.kept and result.part == part and result.stage in stages]
        return kept[-1].after if kept else None

    @property
    def compiles(self) -> bool:
        """True if a change in force compiles something."""
        return any(kept.change.graphs is not None for kept in self.kept)

    def enter(self, result: StageResult, change: AppliedChange | None, instead_of: AppliedChange | None = None) -> None:
        """Enter a verdict.

        Args:
            result: The verdict.
            change: The kept change, if any.
            instead_of: The alternative whose place it takes.
        """
        if change is not None:
            if instead_of is not None:
                self.kept.remove(instead_of)
                for number, slower in enumerate(self.results):
                    if slower.kept and (slower.part, slower.stage) == (instead_of.part, instead_of.stage):
                        dropped = slower.displaced(result.stage)
                        self.results[number] = replace(dropped, sure=result.sure)
                        self.displaced[change.part, change.stage] = instead_of, slower
            self.kept.append(change)
        self.results.append(result)

    def undo(self, undone: StageResult, reason: str) -> None:
        """Give up one kept change. If it took a slower alternative's place, that one is kept again.

        It comes back to where it was, below the changes that were made after it. On top of them it might not apply, and
        a warm pack, which makes the changes in their order, could not be restored.

        Args:
            undone: The change's verdict.
            reason: The reason.
        """
        self.drop(reason, lambda result: result is undone)
        found = self.displaced.pop((undone.part, undone.stage), None)
        if found is None:
            return
        change, verdict = found
        entered = [(result.part, result.stage) for result in self.results]
        number = entered.index((change.part, change.stage))
        earlier = set(entered[:number])
        place = sum((kept.part, kept.stage) in earlier for kept in self.kept)
        self.kept.insert(place, change)  # first, so that it is switched off with the others if it fails half-way
        self.results[number] = verdict
        self.put(change)

    def on(self) -> None:
        """Switch every kept change on."""
        for kept in self.kept:
            kept.change.on()

    def off(self) -> None:
        """Put the object back as it was loaded."""
        switch_off(kept.change for kept in reversed(self.kept))

    def put(self, kept: AppliedChange) -> None:
        """Switch a kept change on again, below the changes that were made after it."""
        with self._above(kept):
            kept.change.on()

    def lift(self, kept: AppliedChange) -> None:
        """Switch a kept change off, below the changes that were made after it."""
        with self._above(kept):
            switch_off((kept.change,))

    @contextmanager
    def _above(self, kept: AppliedChange) -> Generator[None, None, None]:
        # A change stores the class that the module had before, so changes are switched off in reverse order.
        above = [other.change for other in self.kept[self.kept.index(kept) + 1 :]]
        try:
            switch_off(reversed(above))
            yield
        finally:
            for change in above:
                change.on()

    def drop(self, reason: str, unwanted: Callable[[StageResult], bool] = lambda _result: True) -> None:
        """Give up kept changes, and record the reason in their results.

        Args:
            reason: The reason.
            unwanted: Selects the results whose changes are given up; all by default.
        """
        self.off()
        for number, result in enumerate(self.results):
            if result.kept and unwanted(result):
                self.results[number] = result.dropped(f"undone: {reason}")
        names = {(result.part, result.stage) for result in self.results if result.kept}
        self.kept[:] = [kept for kept in self.kept if (kept.part, kept.stage) in names]
        self.on()


def switch_off(changes: Iterable[Change]) -> None:
    """Switch all changes off, even if one raises.

    A change that fails half-way (for lack of memory, for example) is tried once more, since `Change.off` is idempotent.

    Raises:
        Exception: The first exception, after all changes were switched off.
    """
    first: Exception | None = None
    for change in changes:
        for _ in range(2):
            try:
                change.off()
                break
            except Exception as error:  # raised below, after all others
                first = first or error
    if first is not None:
        raise first
