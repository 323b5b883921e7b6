"""One token through all fused blocks of a decoder in one call, while upstream's loop still asks block by block.

Between two blocks there is Python, a tenth of a millisecond of it, and threads that fall asleep and are woken. So when
the first block is asked, all that follow are computed too; each is then asked in turn, and answers with what was made,
if it is asked for exactly that: the same bits, the same cache at the same length, the same mask and rotation. Only then
does its cache count the token. A decoder that does something between its blocks gets each block's own answer as before,
and after three tokens in a row no more is computed ahead for it.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["Ahead", "Row"]

_MOST_MISSES = 3


class Ahead:
    """What the blocks of a row make of one token, and what they must be asked for it.

    Args:
        past: The cache.
        layers: The blocks' layers of it.
        named: What the first block was given beside its input.
        made: What each block makes of it, (blocks, rows, 1, hidden).
    """

    def __init__(self, past: Any, layers: Sequence[Any], named: dict[str, Any], made: torch.Tensor) -> None:
        # Weakly: a loop that breaks off leaves this behind, and not a whole cache.
        self._past: Callable[[], Any] = weakref.ref(past)
        self._state = [_state(layer) for layer in layers]
        self._named = [(name, value) for name, value in named.items() if name != "hidden_states"]
        self._made = made.unbind()
        self.next = 1

    def foresaw(self, hidden: torch.Tensor, past: Any, named: dict[str, Any]) -> bool:
        """Whether this is what the next block would be asked, had it been asked before."""
        state = self._state[self.next]
        if self._past() is not past:
            return False
        layer: Any = past.layers[self.next]
        if id(layer) != state[0] or _state(layer) != state:
            return False
        if len(named) != len(self._named) + 1 or any(named.get(name, self) is not value for name, value in self._named):
            return False
        return _same_bits(hidden, self._made[self.next - 1])

    def take(self) -> torch.Tensor:
        """The next block's answer, in memory of its own."""
        made = self._made[self.next].clone()
        self.next += 1
        return made

    def is_done(self) -> bool:
        """Whether all blocks were asked."""
        return self.next == len(self._state)


def _state(layer: Any) -> tuple[Any, ...]:
    keys, values = layer.buffers()
    return id(layer), layer.length(), keys.data_ptr(), values.data_ptr()


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
        what: For the event that says why nothing is computed ahead any more.
    """

    def __init__(self, size: int, what: str) -> None:
        self._size = size
        self._what = what
        self._mine = threading.local()  # calls on other threads have other caches
        self._misses = 0

    def starts_at(self, place: int) -> bool:
        """Whether the blocks behind this one are worth computing with it."""
        return place == 0 and self._size > 1 and self._misses < _MOST_MISSES

    def remember(self, ahead: Ahead) -> None:
        """Keep what was computed until it is asked for, on this thread."""
        self._mine.ahead = ahead

    def take(self, place: int, hidden: torch.Tensor, past: Any, named: dict[str, Any]) -> Any:
        """What was made for this block before it was asked; `None` if nothing was, or something else."""
        ahead: Ahead | None = getattr(self._mine, "ahead", None)
        if ahead is None:
            return None
        if place != ahead.next or not ahead.foresaw(hidden, past, named):
            self._mine.ahead = None
            if place > 0:  # or else a loop broke off, and another begins
                self._miss()
            return None
        made = ahead.take()
        if ahead.is_done():
            self._mine.ahead = None
            self._misses = 0
        return made

    def _miss(self) -> None:
        self._misses += 1
        if self._misses == _MOST_MISSES:
            reason = "the decoder does something between its blocks, which are computed one by one from here on"
            emit(NotApplied(f"all blocks of {self._what} in one call", reason))
