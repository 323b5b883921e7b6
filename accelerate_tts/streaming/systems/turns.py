"""Sentences one after the other, the next one's tokens perhaps while this one's sound is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.streaming.tokens import Tokens

T = TypeVar("T")


def in_turn(  # noqa: C901 - a loop with all its exits
    texts: Iterable[str],
    begin: Callable[[str], Tokens[T]],
    speak: Callable[[Tokens[T], Callable[[], None]], Iterator[Tensor]],
    *,
    overlap: bool,
) -> Iterator[Tensor]:
    """Yield the pieces of all sentences.

    Args:
        texts: The sentences.
        begin: Returns the tokens of a sentence, not yet started.
        speak: Takes the tokens and a function to be called when all are there; yields the sound.
        overlap: Start the next sentence's tokens when all of this one's are there.
    """
    waiting: list[Tokens[T]] = []
    rest = iter(texts)

    def begin_next() -> None:
        text = next(rest, None)
        if text is not None:
            waiting.append(begin(text))

    def start_next() -> None:
        if overlap and not waiting:
            begin_next()
            for tokens in waiting:
                tokens.start()

    tokens: Tokens[T] | None = None
    try:
        while True:
            if not waiting:
                begin_next()
            if not waiting:
                return
            tokens = waiting.pop()
            yield from speak(tokens, start_next)
            tokens.close()
    finally:
        for each in (tokens, *waiting):
            if each is not None:
                each.close()
