"""Random numbers of a tuning: all threads of a process draw from the same generators, and other ones may draw now.

Two runs are compared under the same random numbers. So a generator that the object does not draw from is left alone,
and a comparison during which another thread drew is made again.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_tts.runtime.seeding import ALL, drawing, other_threads, others_draw, seeded
from accelerate_tts.tuning.compare import EXACT_TOLERANCE, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from accelerate_tts.tuning.compare import Difference

__all__ = ["LOOKS", "WHOLE", "Draws", "OtherThreadsDrawError"]

WHOLE = ""
"""The name of a whole pass, where others are parts'."""

LOOKS = 4
"""Runs for a comparison whose random numbers another thread used."""


class OtherThreadsDrawError(RuntimeError):
    """Other threads draw from the generators of the process all the time, so no two runs have the same numbers."""

    def __init__(self) -> None:
        super().__init__(
            "other threads draw random numbers, so no two runs have the same; load before they start, or give them"
            " their own generators"
        )


class Draws:
    """Seeds the runs of one tuning, and tells if another thread drew meanwhile.

    Args:
        device_type: torch's device type, whose generators are seeded beside the CPU's.

    Attributes:
        left_alone: Generators that the object does not draw from, so that other threads may.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.left_alone: frozenset[str] = frozenset()
        self._unknown = self._shared = False
        self._moved: frozenset[str] = frozenset()
        self._left_by: dict[str, frozenset[str]] = {}
        self._ended: dict[str, dict[str, str]] = {}
        self._undisturbed: dict[str, list[dict[str, str]]] = {}

    @contextmanager
    def seeded(self, what: str, *, watched: bool = False) -> Generator[None, None, None]:
        """Give a part or the whole object the same random numbers every time while open.

        Args:
            what: The part's name, or `WHOLE`.
            watched: Note the draws, if other threads may draw too.
        """
        watched = watched and (self._unknown or other_threads())
        leaving = self._left_by.get(what, self.left_alone)
        with seeded(self._device_type, leaving=leaving, watched=watched) as window:
            yield
        if watched:
            self._moved = window.moved
            known = self._undisturbed.setdefault(what, [])
            # Twice in succession: so it is when nobody else draws.
            if self._ended.get(what) == window.end and window.end not in known:
                known.append(window.end)
            self._ended[what] = window.end

    @contextmanager
    def finding(self) -> Generator[None, None, None]:
        """While open, a first pass shows from which generators the object draws; `found` settles what came of it.

        As long as that is not known, nothing is seeded beside other threads that draw. Those that are there and draw
        nothing change nothing: a service has threads, and its random numbers are restored as those of a script.
        """
        self._shared = others_draw(self._device_type)
        self.left_alone = ALL if self._shared else frozenset()
        self._unknown = True
        try:
            yield
        finally:
            self._unknown = False

    def found(self, output: list[Any], run: Callable[[], list[Any]]) -> bool:
        """Leave the generators alone that the object does not draw from; returns whether the output stands.

        Args:
            output: Results of the first pass.
            run: Makes another pass.
        """
        own = self._moved
        if self._shared and own:
            with drawing() as seen:
                again = run()
            repeats = compare(output, again).error <= EXACT_TOLERANCE
            # A model that draws in a thread of its own is not seen to draw, but its output is another one.
            own = frozenset(seen) if seen or repeats else own
        self.left_alone = ALL - own
        return not (self._shared and own)

    def leave_alone(self, what: str, run: Callable[[], object]) -> None:
        """Leave the generators alone that a part does not draw from, beside other threads that draw."""
        if self.left_alone == ALL or not self._shared:
            return
        self._left_by[what] = ALL
        with drawing() as seen:
            run()
        self._left_by[what] = ALL - seen

    def by_others(self, what: str = WHOLE) -> bool:
        """Tell if the last run, of a part or of the whole, drew as no two runs in succession have done.

        That is so if another thread drew meanwhile. It also is of a change that draws more or less, until its next run.
        """
        return other_threads() and self._ended.get(what) not in self._undisturbed.get(what, [])

    def repeated(
        self, first: list[Any], run: Callable[[], list[Any]], what: str = WHOLE, second: list[Any] | None = None
    ) -> tuple[Difference, list[Any]]:
        """Distance of a second run from a first one, and the first; of two others if another thread drew meanwhile.

        Args:
            first: Results of a run.
            run: Makes another one.
            what: The part's name, or `WHOLE`.
            second: Results of another run, if there was one.

        Raises:
            OtherThreadsDrawError: No two runs had the same random numbers.
        """
        for _ in range(LOOKS):
            second = run() if second is None else second
            found = compare(first, second)
            if found.error <= EXACT_TOLERANCE or not self.by_others(what):
                return found, first
            first, second = second, None
        raise OtherThreadsDrawError

    def confirmed(
        self,
        found: Difference,
        objection: Callable[[Difference], str],
        again: Callable[[], Difference],
        what: str = WHOLE,
    ) -> Difference:
        """A difference; of another run where it is not tolerated, and another thread drew random numbers meanwhile.

        Args:
            found: The difference.
            objection: Says why it is not tolerated, or "".
            again: Makes another run.
            what: The part's name, or `WHOLE`.

        Raises:
            OtherThreadsDrawError: There was no run without.
        """
        for _ in range(LOOKS):
            if not objection(found) or not self.by_others(what):
                return found
            found = again()
        raise OtherThreadsDrawError
