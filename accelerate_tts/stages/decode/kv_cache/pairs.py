"""Growing tensors of caches without layers (transformers before 4.54): two lists of tensors, or a tuple of pairs.

A tensor is a view of a buffer with spare capacity. Only the newest view of a buffer may be extended in place; a
sequence that continues from an older view is copied first. Tensors that other code derives from a view are plain.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_tts.stages.decode.kv_cache import sizes
from accelerate_tts.stages.decode.kv_cache.classes import cache_classes, fit

if TYPE_CHECKING:
    from collections.abc import Callable


class PairLayer:
    """Keys and values of one layer of a cache without growing layers. One object serves one token of a block.

    Args:
        keys: Keys of the positions so far, (batch, heads, positions, head size).
        values: Values, likewise.
        holder: Object whose `keys` and `values` are updated; `None` for a pair in a tuple, which is immutable.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, holder: Any = None) -> None:
        self._keys, self._values = keys, values
        self._holder = holder
        self._is_ours = False

    def buffers(self) -> tuple[Any, Any]:
        """Return keys and values, extended over the whole buffer once `reserve` has succeeded."""
        if not self._is_ours:
            return self.pair()
        return tuple(_longer(tensor, _room(tensor) + 1) for tensor in self.pair())  # type: ignore[return-value]

    def length(self) -> int:
        """Return the number of positions."""
        return int(self._keys.shape[2])

    def reserve(self, positions: int) -> bool:
        """Claim the capacity behind the last position for this token alone.

        Returns:
            False if the claim is not possible and the tensors cannot be replaced by larger buffers.
        """
        if _take(self._keys) and min(_room(self._keys), _room(self._values)) >= positions:
            self._is_ours = True
            return True
        needed = self.length() + positions
        if self._holder is None or needed > sizes.LARGEST:
            return False
        self._keys, self._values = _roomy_pair(self._keys, self._values, needed)
        self._holder.keys, self._holder.values = self._keys, self._values
        self._is_ours = True
        return True

    def advance(self, positions: int) -> None:
        """Extend keys and values by positions that were written behind them."""
        self._keys, self._values = (_longer(tensor, positions) for tensor in self.pair())
        _offer(self._keys)
        if self._holder is not None:
            self._holder.keys, self._holder.values = self._keys, self._values
        if isinstance(self._holder, _Listed):
            self._holder.count(positions)

    def pair(self) -> tuple[Any, Any]:
        """Return keys and values as the next call receives them."""
        return self._keys, self._values

    def mark(self) -> _Mark:
        """Return a token of the layer's present state, for `is_at`."""
        return _Mark(weakref.ref(self._keys), weakref.ref(self._values))

    def is_at(self, mark: Any) -> bool:
        """Check that the state has not changed since `mark`."""
        return isinstance(mark, _Mark) and mark.keys() is self._keys and mark.values() is self._values

    def release(self) -> None:
        """Give back the capacity that `reserve` claimed, for a token that is not written after all."""
        _offer(self._keys)


class _Listed:
    """One layer of a cache of two lists (transformers before 4.54)."""

    def __init__(self, past: Any, number: int) -> None:
        self._past, self._number = past, number

    @property
    def keys(self) -> Any:
        return self._past.key_cache[self._number]

    @keys.setter
    def keys(self, tensor: Any) -> None:
        self._past.key_cache[self._number] = tensor

    @property
    def values(self) -> Any:
        return self._past.value_cache[self._number]

    @values.setter
    def values(self, tensor: Any) -> None:
        self._past.value_cache[self._number] = tensor

    def count(self, positions: int) -> None:
        """Add to the cache's count of positions, which follows the first layer."""
        if self._number == 0 and hasattr(self._past, "_seen_tokens"):
            self._past._seen_tokens += positions


class _Mark(NamedTuple):
    keys: Callable[[], Any]
    values: Callable[[], Any]


def release(mark: Any) -> None:
    """Give back the capacity that a marked layer claimed, if the layer is still alive."""
    if isinstance(mark, _Mark) and (keys := mark.keys()) is not None:
        _offer(keys)


open_buffers: dict[int, weakref.ref[Any]] = {}
"""Keys that are the newest view of a buffer and whose spare capacity is unclaimed, by id.

A tuple may be used twice, even by two threads at once: only the caller that removes a view from here may write behind
it.
"""


def _offer(keys: torch.Tensor) -> None:
    place = id(keys)

    def forget(gone: Any) -> None:
        if open_buffers.get(place) is gone:
            del open_buffers[place]

    open_buffers[place] = weakref.ref(keys, forget)


def _take(keys: torch.Tensor) -> bool:
    found = open_buffers.pop(id(keys), None)
    return found is not None and found() is keys


def _room(tensor: torch.Tensor) -> int:
    """Return the spare positions behind a view of a buffer. One always stays free, as in a growing layer."""
    return tensor.stride(1) // max(1, tensor.stride(2)) - tensor.shape[2] - 1


def _longer(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    rows, heads, length, size = tensor.shape
    return tensor.as_strided((rows, heads, length + positions, size), tensor.stride())


def _roomy_pair(keys: torch.Tensor, values: torch.Tensor, needed: int) -> tuple[Any, Any]:
    """Copy keys and values into buffers with spare capacity; return views of the same shapes."""
    capacity = min(sizes.capacity_for(needed, tensor) for tensor in (keys, values))
    made = []
    for tensor in (keys, values):
        rows, heads, length, size = tensor.shape
        with torch.inference_mode(mode=False):  # a sequence may continue outside inference mode
            buffer = torch.zeros((rows, heads, capacity, size), dtype=tensor.dtype, device=tensor.device)
        buffer[:, :, :length] = tensor
        made.append(buffer[:, :, :length])
    return made[0], made[1]


def is_pair(past: tuple[Any, ...]) -> bool:
    """Check for the keys and the values of one layer."""
    return len(past) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in past) and fit(*past)  # noqa: PLR2004


def listed_layer(past: Any, number: int) -> Any:
    """Return one layer of a cache of two lists; `None` for other caches, and for a layer without tensors."""
    classes = sys.modules.get("transformers.cache_utils")
    if classes is None or type(past) is not classes.DynamicCache or number >= len(past.key_cache):
        return None
    holder = _Listed(past, number)
    pair = (holder.keys, holder.values)
    return PairLayer(*pair, holder) if is_pair(pair) else None  # a layer that was skipped is an empty list


def is_tuple(past: Any) -> bool:
    """Check for a legacy cache: a tuple with a pair of tensors for each layer."""
    return isinstance(past, tuple) and bool(past) and all(isinstance(pair, tuple) and is_pair(pair) for pair in past)


def is_listed(past: Any) -> bool:
    """Check for a cache of two lists, each item of which is a tensor."""
    count = len(getattr(past, "key_cache", ())) if cache_classes() is None else 0
    return count > 0 and all(listed_layer(past, number) is not None for number in range(count))


def with_room(past: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a tuple of pairs of the same content with capacity for one more token; pairs that have it are reused."""
    if hasattr(getattr(cache_classes(), "DynamicLayer", None), "lazy_initialization"):
        return past  # 4.56 and later copy it into a cache
    found: list[tuple[Any, Any]] = []
    for keys, values in past:
        there = open_buffers.get(id(keys))
        is_ours = there is not None and there() is keys
        if not is_ours or min(_room(keys), _room(values)) < 1:
            if keys.shape[2] + 1 > sizes.LARGEST:
                return past
            found.append(_roomy_pair(keys, values, keys.shape[2] + 1))
            _offer(found[-1][0])
        else:
            found.append((keys, values))
    return tuple(found)


def give_room(past: Any) -> Any:
    """Give a replayed call's cache normal tensors with spare capacity, as it has in the middle of a loop.

    Args:
        past: A tuple of pairs, or a cache of two lists, whose tensors are replaced.

    Returns:
        A new tuple, or the same cache.
    """
    pairs = past if isinstance(past, tuple) else tuple(zip(past.key_cache, past.value_cache, strict=True))
    grown = tuple(_roomy_pair(keys, values, keys.shape[2] + 1) for keys, values in pairs)
    for keys, _ in grown:
        _offer(keys)
    if isinstance(past, tuple):
        return grown
    for number, (keys, values) in enumerate(grown):
        past.key_cache[number], past.value_cache[number] = keys, values
    return past
