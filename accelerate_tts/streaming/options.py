"""Options of a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real

from accelerate_tts.errors import SettingsError, shown
from accelerate_tts.streaming.sentences import sentences

_MOST_TOKENS = 2**31
"""Maximum tokens of a piece, more than any text has. `most` may be infinite."""


@dataclass(frozen=True)
class StreamOptions:
    """Options of a stream.

    Attributes:
        first: Seconds of speech in the first piece of a sentence. Less is an earlier sound.
        growth: Ratio of each piece to the one before. Each piece costs its overlap, so few large ones cost less.
        most: Seconds of speech in the largest piece; `math.inf` for no limit.
        left_context: Seconds of speech that a flow sees before a piece, where the flow looks at all of its input
            (Chatterbox). The stream then differs from the whole. `None` makes the sound of each sentence at once, as
            upstream does.
        overlap: Make the next tokens while the sound of the ones before is made. Both divide torch's threads by what
            they were measured to take; where that is no faster than taking turns, they take turns. A seed then does not
            make the stream repeatable.
        split: Splits a text into sentences; `None` to speak it at once.

    Raises:
        SettingsError: A value is out of its range.
    """

    first: float = 0.4
    growth: float = 2.0
    most: float = 4.0
    left_context: float | None = None
    overlap: bool = False
    split: Callable[[str], Iterable[str]] | None = sentences

    def __post_init__(self) -> None:
        first, most, growth = map(_number, (self.first, self.most, self.growth))
        if not 0.0 < first <= most:
            raise SettingsError(
                f"first={shown(self.first)} and most={shown(self.most)} must be seconds: 0 < first <= most"
            )
        if not growth >= 1.0:
            raise SettingsError(f"growth={shown(self.growth)} must be at least 1, so that later pieces are not smaller")
        if self.left_context is not None and not _number(self.left_context) > 0.0:
            raise SettingsError(f"left_context={shown(self.left_context)} must be seconds above 0, or None")
        if self.split is not None and not callable(self.split):
            raise SettingsError(f"split={shown(self.split)} must be a callable such as pysbd's, or None")

    def sizes(self, rate: float) -> Iterator[int]:
        """Yield the number of tokens (or frames) of each piece, without end.

        Args:
            rate: Tokens a second of speech.
        """
        seconds = self.first
        while True:
            yield max(1, round(min(seconds * rate, _MOST_TOKENS)))
            seconds = min(seconds * self.growth, self.most)

    def sentences(self, text: str) -> list[str]:
        """Return the sentences of a text; the text itself if it is not to be split, and nothing for an empty one."""
        if self.split is None:
            return [text] if any(character.isalnum() for character in text) else []
        return list(self.split(text))


def _number(value: object) -> float:
    """Return an option as a float; NaN, which fails each comparison, if it is no number or too large for one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
