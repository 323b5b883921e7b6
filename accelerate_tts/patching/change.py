"""Base class of reversible changes."""

from __future__ import annotations


class BaseChange:
    """Base class of changes that compile nothing."""

    @property
    def graphs(self) -> int | None:
        """Number of compiled graphs; `None`, since nothing is compiled."""
        return None

    def seal(self) -> None:
        """Do nothing, since nothing is compiled."""
