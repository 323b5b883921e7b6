"""Callers of shared steps that meet, whatever the machine does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from threaded import LONG, at_once

from accelerate_tts.stages.decode.shared_steps import SharedSteps


class Brief:
    """A clock by which a pass takes two milliseconds at most, however long it really took.

    Callers wait for each other for a share of the last pass. Where tests have them wait for a hundred passes, one in
    which the machine did something else, or recorded, would have them wait for a minute.
    """

    MOST = 0.002

    def __init__(self) -> None:
        self._left_out = 0.0

    def clock(self) -> float:
        return time.perf_counter() - self._left_out

    def within(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Return what computes a pass, by this clock."""

        def computed(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                return compute(*given)
            finally:
                self._left_out += max(0.0, time.perf_counter() - start - self.MOST)

        return computed


class _Opening:
    """A step of nobody's, in whose pass all callers arrive."""

    rows = 1

    def layout(self) -> None:
        """It joins no other."""


def meeting(steps: SharedSteps, works: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own, as `at_once` does. Their first steps wait for each other.

    A small model's step takes microseconds, and on a busy machine one caller may be done before the next one begins. So
    a step that is none of theirs opens the meeting: its pass ends when each of them has a step that waits, or is done.
    """
    there: set[threading.Thread] = set()
    all_there = threading.Event()
    clock, alone = steps.rules.clock, steps.rules.alone

    def came() -> None:
        there.add(threading.current_thread())
        if len(there) == len(works):
            all_there.set()

    def noted() -> float:
        """Called by each caller as it arrives, behind the lock of the meeting."""
        if threading.current_thread() is not opener:
            came()
        return clock()

    def opened(blocks: Any, call: Any) -> Any:
        if not isinstance(call, _Opening):
            return alone(blocks, call)
        is_open.set()
        assert all_there.wait(LONG), "a caller did not come"
        return None

    def opening() -> None:
        nonlocal opener
        opener = threading.current_thread()
        steps.run((), _Opening())  # type: ignore[arg-type]  # `opened` computes it

    def after_it(work: Callable[[], Any]) -> Any:
        assert is_open.wait(LONG)
        try:
            return work()
        finally:
            came()

    opener: threading.Thread | None = None
    is_open = threading.Event()
    usual = steps.rules
    steps.rules = usual._replace(clock=noted, alone=opened)
    try:
        opened_by, *found = at_once([opening, *(lambda work=work: after_it(work) for work in works)])
    finally:
        steps.rules = usual
    if opened_by is not None:
        raise opened_by
    return found
