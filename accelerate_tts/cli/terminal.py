"""Output of the commands: the single place that removes control characters from all texts.

Names, reasons and paths come from foreign files, objects and exceptions. Callers may format them with `printable`; in
any case no escape sequence passes this module.
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
    """A rich console that prints texts literally: no markup, no emoji codes, no control characters.

    Args:
        options: Options of rich's `Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, "markup": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich. Its own control codes (of a progress bar) are not texts, and pass."""
        for segment in super().render(renderable, options):
            if segment.control or all(c.isprintable() or c == "\n" for c in segment.text):
                yield segment
            else:
                yield Segment("\n".join(_cleaned(line) for line in segment.text.split("\n")), segment.style)


def _cleaned(line: str) -> str:
    # Character by character, since tables need their spaces.
    return "".join(printable(c) or " " for c in line)


def say(line: str) -> None:
    """Write a line to standard output, flushed at once, also into a file, since tuning takes minutes."""
    sys.stdout.write(f"{_cleaned(line)}\n")
    sys.stdout.flush()
