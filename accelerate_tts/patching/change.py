"""Base class of reversible changes."""

from __future__ import annotations

__all__ = ["BaseChange"]


class BaseChange:
    """A change that compiles nothing."""

    @property
    def graphs(self) -> int | None:
        """Graphs compiled so far; none, ever."""
        return None

    def seal(self) -> None:
        """Nothing is compiled."""
