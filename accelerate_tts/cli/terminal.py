"""Where all texts of the commands go out: what no terminal should be told is taken out of them here.

Names, reasons and paths come from others' files, objects and exceptions. Whoever shows them may lay them out with
`printable` before; whether he does or not, no escape sequence of theirs passes this place.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from accelerate_tts.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType

__all__ = ["Terminal", "say"]


class Terminal(Console):
    """A console of rich that shows foreign texts as texts: no markup, no emoji codes, no control characters.

    Args:
        options: As for rich's `Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, "markup": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich. Its own control codes (of a progress bar) are no texts, and pass."""
        for segment in super().render(renderable, options):
            if segment.control or all(c.isprintable() or c == "\n" for c in segment.text):
                yield segment
            else:
                yield Segment("\n".join(_cleaned(line) for line in segment.text.split("\n")), segment.style)


def _cleaned(line: str) -> str:
    # Each for itself: spaces are what a table is laid out with.
    return "".join(printable(c) or " " for c in line)


def say(line: str) -> None:
    """Write a line to standard output, at once, also into a file: a tuning takes minutes."""
    sys.stdout.write(f"{_cleaned(line)}\n")
    sys.stdout.flush()
