"""One token through all fused blocks of a decoder in one call, while upstream's loop still asks block by block.

Between two blocks there is Python, a tenth of a millisecond of it, and threads that fall asleep and are woken. So when
the first block is asked, all that follow are computed too; each is then asked in turn, and answers with what was made,
if it is asked for exactly that: the same bits, the same cache at the same length, the same mask and rotation. Only then
does its cache count the token. Where a decoder does something between two of its blocks, the second is soon no longer
computed with the first; once it was asked three times in a row for just what the first had made, it is again.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.stages.decode import kv_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["Ahead", "Made", "Row"]

_SURE = 3
"""Tokens in a row after which a place between two blocks counts as disturbed, or as undisturbed again."""


class Made(NamedTuple):
    """What a block makes of a token."""

    hidden: torch.Tensor
    """(rows, 1, hidden), in memory of its own."""
    weights: torch.Tensor | None
    """Its attention weights, (rows, heads, 1, positions), if they were asked for."""
    layer: Any
    """Its layer of the cache, which does not count the token yet."""
    form: tuple[str, ...] | None
    """What upstream returns behind the hidden states; `None` for the states alone."""


class Ahead:
    """What some blocks of a row, one behind the other, make of one token, and what they must be asked for it.

    Args:
        first: The place of the first of them in the row; it was asked already.
        past: The cache; of a tuple of pairs, the first block's pair.
        layers: The blocks' layers of it.
        named: What the first block was given beside its input.
        made: What each block makes of it, (blocks, rows, 1, hidden).
        weights: Their attention weights, (blocks, rows, heads, 1, positions), if they were asked for.
        form: What they return; see `Made`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call consists of
        self,
        first: int,
        past: Any,
        layers: Sequence[Any],
        named: dict[str, Any],
        made: torch.Tensor,
        weights: torch.Tensor | None,
        form: tuple[str, ...] | None,
    ) -> None:
        # Weakly: a loop that breaks off leaves this behind, and not a whole cache.
        self._past: Callable[[], Any] | None = None if isinstance(past, tuple) else weakref.ref(past)
        self._marks = [layer.mark() for layer in layers]
        self._named = [(name, value) for name, value in named.items() if name != "hidden_states"]
        self._made = made.unbind()
        self._weights, self._form = weights, form
        self._first = first
        self.next = first + 1

    def expects(self, hidden: torch.Tensor, past: Any, named: dict[str, Any]) -> bool:
        """Whether this is the input that the next block would have been given, had it been asked before."""
        if self._past is not None and self._past() is not past:
            return False
        if len(named) != len(self._named) + 1 or any(named.get(name, self) is not value for name, value in self._named):
            return False
        return _same_bits(hidden, self._made[self.next - 1 - self._first])

    def layer_of(self, past: Any) -> Any:
        """The next block's layer, if its cache is as it was; `None` otherwise."""
        layer = kv_cache.growing_layer(past, self.next)
        return layer if layer is not None and layer.is_at(self._marks[self.next - self._first]) else None

    def take(self, layer: Any) -> Made:
        """The next block's answer, in memory of its own."""
        place = self.next - self._first
        self.next += 1
        weights = None if self._weights is None else self._weights[place]
        return Made(self._made[place].clone(), weights, layer, self._form)

    def is_done(self) -> bool:
        """Whether all blocks that were computed have answered."""
        return self.next == self._first + len(self._marks)

    def release(self) -> None:
        """Nobody will ask for the rest: the room behind these caches may be used by others."""
        for mark in self._marks[self.next - self._first :]:
            kv_cache.release(mark)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.dtype != other.dtype or torch.equal(one, other):
        return one.dtype == other.dtype
    bits = torch.int32 if one.element_size() == 4 else torch.int16  # noqa: PLR2004
    return torch.equal(one.view(bits), other.view(bits))  # what is not a number equals nothing


class Row:
    """The fused blocks of one decoder, in their order.

    Args:
        size: How many.
        what: For the event that says why not all are computed in one call.
    """

    def __init__(self, size: int, what: str) -> None:
        self._size = size
        self._what = what
        self._mine = threading.local()  # calls on other threads have other caches
        self._surprises: dict[int, int] = {}  # place: how often in a row it was asked for something else
        self._calm: dict[int, int] = {}  # a disturbed place: how often in a row it was asked for what was foreseen

    def together(self, place: int) -> range:
        """The places behind this one that are worth computing with it."""
        end = self._size
        if self._calm:
            end = min((other for other in self._calm if other > place), default=end)
        return range(place + 1, end)

    def remember(self, ahead: Ahead) -> None:
        """Keep what was computed until it is asked for, on this thread."""
        if ahead.next < self._size:
            self._mine.ahead = ahead

    def take(self, place: int, hidden: torch.Tensor, past: Any, named: dict[str, Any]) -> Made | None:
        """What was made for this block before it was asked; `None` if nothing was, or something else."""
        ahead: Ahead | None = getattr(self._mine, "ahead", None)
        if ahead is None:
            return None
        expected = place == ahead.next and ahead.expects(hidden, past, named)
        if ahead.is_done():  # it was not computed, for something disturbs it, or did
            self._mine.ahead = None
            self._note(place, expected=expected)
            return None
        layer = ahead.layer_of(past) if expected else None
        if layer is None:
            self._mine.ahead = None
            ahead.release()
            self._note(place, expected=False)
            return None
        made = ahead.take(layer)
        if ahead.next == self._size:
            self._mine.ahead = None
        if self._surprises:
            self._note(place, expected=True)
        return made

    def _note(self, place: int, *, expected: bool) -> None:
        if place == 0:  # a loop broke off, and another begins
            return
        if place not in self._calm:
            if expected:
                self._surprises.pop(place, None)
                return
            self._surprises[place] = self._surprises.get(place, 0) + 1
            if self._surprises[place] == _SURE:
                if not self._calm:
                    reason = f"the decoder does something before block {place}, where another call begins from here on"
                    emit(NotApplied(f"all blocks of {self._what} in one call", reason))
                self._calm[place] = 0
        else:
            self._calm[place] = self._calm[place] + 1 if expected else 0
            if self._calm[place] == _SURE:
                del self._calm[place], self._surprises[place]
