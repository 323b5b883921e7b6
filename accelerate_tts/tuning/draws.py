"""Random numbers of a tuning. All threads of a process draw from the same generators.

Two runs are compared under the same random numbers, so the generators are seeded before each. Generators that the
object does not use are not seeded, since other threads may use them. A comparison is repeated if another thread drew
during it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from accelerate_tts.runtime.drawing import drawing
from accelerate_tts.runtime.seeding import ALL, other_threads, others_draw, seeded
from accelerate_tts.settings import EXACT_TOLERANCE
from accelerate_tts.tuning.compare import Difference, compare

WHOLE = ""
"""Name of a whole pass, among the names of parts."""

LOOKS = 4
"""Maximum runs of a comparison while another thread draws."""


class OtherThreadsDrawError(RuntimeError):
    """Other threads draw from the process's generators all the time, so no two runs have the same numbers."""

    def __init__(self) -> None:
        super().__init__(
            "other threads draw random numbers, so no two runs have the same; load before they start, or give them"
            " their own generators"
        )


class Draws:
    """Seeds the runs of one tuning, and detects draws of other threads during a run.

    Args:
        device_type: torch's device type, whose generators are seeded beside the CPU's.

    Attributes:
        left_alone: Generators that the object does not use. They are not seeded.
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
        """Seed the generators of a part or of the whole object while open, the same every time.

        Args:
            what: The part's name, or `WHOLE`.
            watched: Record the generators' final states if other threads may draw, too.
        """
        watched = watched and (self._unknown or other_threads())
        leaving = self._left_by.get(what, self.left_alone)
        with seeded(self._device_type, leaving=leaving, watched=watched) as window:
            yield
        if watched:
            self._moved = window.moved
            known = self._undisturbed.setdefault(what, [])
            # Equal states after two runs in succession: no other thread drew.
            if self._ended.get(what) == window.end and window.end not in known:
                known.append(window.end)
            self._ended[what] = window.end

    def whole(self, run: Callable[[], list[Any]]) -> list[Any]:
        """Run a warm-up pass with the same random numbers every time, and return its results."""
        with self.seeded(WHOLE, watched=True):
            return run()

    @contextmanager
    def finding(self) -> Generator[None, None, None]:
        """Observe a first pass while open, to find the generators that the object uses; `found` evaluates it.

        Until they are known, nothing is seeded if other threads draw. Threads that draw nothing make no difference.
        """
        self._shared = others_draw(self._device_type)
        self.left_alone = ALL if self._shared else frozenset()
        self._unknown = True
        try:
            yield
        finally:
            self._unknown = False

    def found(self, output: list[Any], run: Callable[[], list[Any]]) -> bool:
        """Stop seeding the generators that the object does not use; return False if the first output is not valid.

        The output is not valid if the object draws and other threads drew too, since nothing was seeded.

        Args:
            output: Results of the first pass.
            run: Runs another pass.
        """
        own = self._moved
        if self._shared and own:
            with drawing() as seen:
                again = run()
            repeats = compare(output, again).error <= EXACT_TOLERANCE
            # Draws in a thread of the model's own are not seen, but change the output.
            own = frozenset(seen) if seen or repeats else own
        self.left_alone = ALL - own
        return not (self._shared and own)

    def leave_alone(self, what: str, run: Callable[[], object]) -> None:
        """Stop seeding the generators that a part does not use, if other threads draw."""
        if self.left_alone == ALL or not self._shared:
            return
        self._left_by[what] = ALL
        with drawing() as seen:
            run()
        self._left_by[what] = ALL - seen

    def by_others(self, what: str = WHOLE) -> bool:
        """Check for a last run, of a part or of the whole, after which the generators are in a new state.

        Another thread drew during that run, or a change draws more or less. The next run tells the two apart.
        """
        return other_threads() and self._ended.get(what) not in self._undisturbed.get(what, [])

    def repeated(
        self, first: list[Any], run: Callable[[], list[Any]], what: str = WHOLE, second: list[Any] | None = None
    ) -> tuple[Difference, list[Any]]:
        """Compare two runs; return the difference and the first results. Repeated while another thread draws.

        Args:
            first: Results of a run.
            run: Makes another run.
            what: The part's name, or `WHOLE`.
            second: Results of a second run, if there is one.

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
        """Return a difference, or that of a repeated run if it is not tolerated and another thread drew during the run.

        Args:
            found: The difference.
            objection: Returns the reason why it is not tolerated, or "".
            again: Makes another run.
            what: The part's name, or `WHOLE`.

        Raises:
            OtherThreadsDrawError: Another thread drew during every run.
        """
        for _ in range(LOOKS):
            if not objection(found) or not self.by_others(what):
                return found
            found = again()
        raise OtherThreadsDrawError
