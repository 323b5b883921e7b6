"""Sentences one after the other, the next one's tokens perhaps while this one's sound is made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from accelerate_tts.streaming.shares import Shares
    from accelerate_tts.streaming.tokens import Tokens

T = TypeVar("T")


def in_turn(
    texts: Iterable[str],
    begin: Callable[[str, Shares | None], Tokens[T]],
    speak: Callable[[Tokens[T], Callable[[], None]], Iterator[Tensor]],
    shares: Shares | None,
) -> Generator[Tensor, None, None]:
    """Yield the pieces of all sentences.

    Args:
        texts: The sentences.
        begin: Takes a sentence, and the shares of threads of a loop that runs ahead; returns its tokens, not yet
            started.
        speak: Takes the tokens and a function to be called when all are there; yields the sound.
        shares: Divides the threads between tokens and sound. The next sentence's tokens are then started when all of
            this one's are there. Without it, and where it says so, tokens and sound take turns.
    """
    pieces = _in_turn(texts, begin, speak, shares)
    return pieces if shares is None else shares.lend(pieces)


def _in_turn(  # noqa: C901 - a loop with all its exits
    texts: Iterable[str],
    begin: Callable[[str, Shares | None], Tokens[T]],
    speak: Callable[[Tokens[T], Callable[[], None]], Iterator[Tensor]],
    shares: Shares | None,
) -> Generator[Tensor, None, None]:
    waiting: list[Tokens[T]] = []
    rest = iter(texts)

    def begin_next() -> None:
        text = next(rest, None)
        if text is not None:
            waiting.append(begin(text, shares if shares is not None and shares.overlaps else None))

    def start_next() -> None:
        if shares is not None and shares.overlaps and not waiting:
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
