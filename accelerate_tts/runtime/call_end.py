"""Reports at the end of calls. Figures that are counted in each step are told once a call."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_due: deque[Callable[[], object]] = deque()


def tell_at_end(report: Callable[[], object]) -> None:
    """Make a report once, when the next call ends, on any thread."""
    _due.append(report)


def end_call() -> None:
    """Make the reports that are due."""
    for _ in range(len(_due)):
        try:
            report = _due.popleft()
        except IndexError:  # another thread makes it
            return
        report()
