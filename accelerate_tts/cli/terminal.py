"""Output of the commands: the single place that removes control characters from all texts.

Names, reasons and paths come from foreign files, objects and exceptions. Callers may format them with `printable`; in
any case no escape sequence passes this module, nor `lines`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from accelerate_tts.cli.lines import cleaned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType


class Terminal(Console):
    """A rich console that prints texts literally: no markup, no emoji codes, no control characters.

    Args:
        options: Options of rich's `Console`.
    """

    def __init__(self, **options: Any) -> None:
        told: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False, **options}
        super().__init__(**told)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich. Its own control codes (of a progress bar) are not texts, and pass."""
        for segment in super().render(renderable, options):
            if segment.control or all(c.isprintable() or c == "\n" for c in segment.text):
                yield segment
            else:
                yield Segment("\n".join(cleaned(line) for line in segment.text.split("\n")), segment.style)
