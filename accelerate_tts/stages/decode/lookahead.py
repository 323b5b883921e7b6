"""Lookahead: one kernel call computes a token for all fused blocks, while upstream's loop calls block by block.

Between two blocks, Python takes a tenth of a millisecond, and the kernel's threads fall asleep and are woken. When the
first block is called, the blocks behind it are therefore computed too. Each later block returns its precomputed result
if its input matches: the same bits, the same cache at the same length, the same mask and rotation. Only then does its
cache count the token. Where a decoder changes the hidden states between two blocks, the second is no longer computed
with the first after three mismatches in a row. Three matches in a row undo this.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.stages.decode import kv_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_IN_A_ROW = 3
"""Consecutive mismatches after which a block is no longer computed ahead, and matches after which it is again."""


class Made(NamedTuple):
    """Result of a block for one token."""

    hidden: torch.Tensor
    """Hidden states, (batch, 1, hidden), in memory of their own."""
    weights: torch.Tensor | None
    """Attention weights, (batch, heads, 1, positions), if they were requested."""
    layer: Any
    """The block's cache layer, which does not count the token yet."""
    form: tuple[str, ...] | None
    """Kinds of the items that upstream returns behind the hidden states; `None` for the states alone."""


class Ahead:
    """Precomputed results of consecutive blocks for one token, and the inputs for which they are valid.

    Args:
        first: Index of the first block. It has been called already.
        past: The cache; the first block's pair if the cache is a tuple of pairs.
        layers: Cache layers of the blocks.
        named: Arguments of the first block.
        made: Hidden states of each block, (blocks, batch, 1, hidden).
        weights: Attention weights of each block, (blocks, batch, heads, 1, positions), if they were requested.
        form: Form of the results; see `Made`.
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
        # Weak: a loop that is abandoned leaves this object behind, and must not leave a whole cache.
        self._past: Callable[[], Any] | None = None if isinstance(past, tuple) else weakref.ref(past)
        self._marks = [layer.mark() for layer in layers]
        self._named = [(name, value) for name, value in named.items() if name != "hidden_states"]
        self._made = made.unbind()
        self._weights, self._form = weights, form
        self._first = first
        self.next = first + 1

    def expects(self, hidden: Any, past: Any, named: dict[str, Any]) -> bool:
        """Check that a call's input is the one that the next block was computed for."""
        if type(hidden) is not torch.Tensor or not hidden.is_cpu or hidden.layout is not torch.strided:
            return False
        if self._past is not None and self._past() is not past:
            return False
        if len(named) != len(self._named) + 1:
            return False
        for name, value in self._named:  # no generator: this runs for each block at each token
            if named.get(name, self) is not value:
                return False
        return _same_bits(hidden, self._made[self.next - 1 - self._first])

    def layer_of(self, past: Any) -> Any:
        """Return the next block's cache layer if it is unchanged, else `None`."""
        return kv_cache.layer_at(past, self.next, self._marks[self.next - self._first])

    def take(self, layer: Any) -> Made:
        """Return the next block's result, in memory of its own."""
        place = self.next - self._first
        self.next += 1
        weights = None if self._weights is None else self._weights[place]
        return Made(self._made[place].clone(), weights, layer, self._form)

    def is_done(self) -> bool:
        """Check that all computed blocks have returned their results."""
        return self.next == self._first + len(self._marks)

    def release(self) -> None:
        """Give back the cache capacity that was claimed for results which will not be used."""
        for mark in self._marks[self.next - self._first :]:
            kv_cache.release(mark)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or torch.equal(one, other):
        return one.dtype == other.dtype
    bits = torch.int32 if one.element_size() == 4 else torch.int16  # noqa: PLR2004
    return torch.equal(one.view(bits), other.view(bits))  # NaN does not equal itself


class BlockStack:
    """The stack of one decoder's fused blocks, in order, and the results computed ahead for them.

    Args:
        size: Number of blocks.
        what: Name for the event that says why not all blocks are computed in one call.
    """

    def __init__(self, size: int, what: str) -> None:
        self._size = size
        self._what = what
        self._mine = threading.local()  # other threads have other caches
        self._mismatches: dict[int, int] = {}  # index of a block: consecutive mismatches
        self._skipped: dict[int, int] = {}  # index of a block that is not computed ahead: consecutive matches

    def together(self, place: int) -> range:
        """Return the indices of the blocks that are computed together with this one."""
        end = self._size
        if self._skipped:
            end = min((other for other in self._skipped if other > place), default=end)
        return range(place + 1, end)

    def remember(self, ahead: Ahead) -> None:
        """Store results that were computed ahead, for this thread."""
        if ahead.next < self._size:
            self._mine.ahead = ahead

    def take(self, place: int, hidden: Any, past: Any, named: dict[str, Any]) -> Made | None:
        """Return the precomputed result of this block; `None` if there is none for this input."""
        ahead: Ahead | None = getattr(self._mine, "ahead", None)
        if ahead is None:
            return None
        expected = place == ahead.next and ahead.expects(hidden, past, named)
        if ahead.is_done():  # this block was not computed ahead; count a match or a mismatch
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
        if self._mismatches:
            self._note(place, expected=True)
        return made

    def _note(self, place: int, *, expected: bool) -> None:
        if place == 0:  # a loop was abandoned, and another one begins
            return
        if place not in self._skipped:
            if expected:
                self._mismatches.pop(place, None)
                return
            self._mismatches[place] = self._mismatches.get(place, 0) + 1
            if self._mismatches[place] == _IN_A_ROW:
                if not self._skipped:
                    reason = f"the decoder changes states or mask before block {place}; another call begins there"
                    emit(NotApplied(f"all blocks of {self._what} in one call", reason))
                self._skipped[place] = 0
        else:
            self._skipped[place] = self._skipped[place] + 1 if expected else 0
            if self._skipped[place] == _IN_A_ROW:
                del self._skipped[place], self._mismatches[place]
