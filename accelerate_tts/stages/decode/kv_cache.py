"""Key/value caches of transformers that grow in place.

Upstream makes a new tensor of the whole cache at every token, by `torch.cat`: with 30 layers and 500 positions a
quarter of a gigabyte is written for each token. Here keys and values lie in buffers with room to spare, and a token is
written behind the last one.

A cache with `.layers` (transformers 4.54 and later) is given layers of another class. Their `keys` and `values` are
what they are upstream, the tensors of the positions so far, and may be assigned to; so cropping, reordering for beams,
repeating, selecting and copying work by upstream's own code.

Before, a cache was two lists of tensors, or a tuple of pairs of them that nobody changes. There a tensor itself may
have room behind it: it is a view of a buffer, and the newest one of it. Whatever is made of it by others is a plain
tensor, and an older view is left alone: a sequence that goes on from it is copied first.

transformers is not imported here unless the user's model has already done so.
"""

from __future__ import annotations

import sys
import weakref
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = [
    "LARGEST",
    "PairLayer",
    "adopt",
    "are_caches_loaded",
    "attentions_wanted",
    "give_room",
    "growing_layer",
    "is_growable",
    "is_listed",
    "is_tuple",
    "release",
    "room_for",
    "step_cache",
    "step_classes",
    "whole_tuple",
    "with_room",
]

attentions_wanted: ContextVar[bool] = ContextVar("attentions_wanted", default=False)
"""Whether the decoder that runs was asked for its attention weights, which its blocks are not always told."""
whole_tuple: ContextVar[tuple[Any, ...] | None] = ContextVar("whole_tuple", default=None)
"""The tuple of pairs that the decoder was called with which runs; a block of GPT-2 was given its own pair only."""

_BUCKET = 128
_MOST_ROOM = 4 << 20
"""Bytes that a buffer holds beyond the sequence: of T3, whose caches are 60 such buffers, 500 positions."""
LARGEST = 16_384
"""Positions that a buffer may hold. What is longer goes on as upstream has it."""


def cache_classes() -> Any:
    """The caches of transformers, as a module, if it is loaded and has cache layers; `None` otherwise."""
    module = sys.modules.get("transformers.cache_utils")
    return module if module is not None and hasattr(module, "DynamicLayer") else None


def are_caches_loaded() -> bool:
    """Whether caches of transformers are there to grow."""
    return hasattr(sys.modules.get("transformers.cache_utils"), "DynamicCache")


def is_growable(past: Any) -> bool:
    """Whether this is a plain dynamic cache with a sequence in it, each layer of which can be a growing one.

    Sliding windows, quantised, offloaded and static layers, and caches of other classes, are upstream's business.
    """
    classes = cache_classes()
    if classes is None or type(past) is not classes.DynamicCache or _is_processed(past):
        return False
    plain: Any = classes.DynamicLayer
    growing: Any = growing_class()
    return bool(past.layers) and all(
        (type(layer) is growing and layer.holds()) or (type(layer) is plain and _holds(layer)) for layer in past.layers
    )


def _holds(layer: Any) -> bool:
    return bool(getattr(layer, "is_initialized", True)) and _fit(layer.keys, layer.values)


def _fit(keys: Any, values: Any) -> bool:
    if keys is None or values is None:
        return False
    # Heads may be wider in values than in keys; batch, heads and positions must agree.
    return bool(keys.dim() == 4 and keys.numel() > 0 and keys.shape[:-1] == values.shape[:-1])  # noqa: PLR2004


def growing_class() -> Any:
    """The class of growing layers, for the transformers that is loaded."""
    return _growing_class(cache_classes())


def adopt(past: Any) -> None:
    """Make the layers of a growable cache growing ones, in place."""
    base, growing = cache_classes().DynamicLayer, growing_class()
    for number, layer in enumerate(past.layers):
        if type(layer) is base:
            past.layers[number] = growing.of(layer)


def room_for(past: Any, positions: int) -> bool:
    """Make room for some more positions in an adopted cache; False if that would be more than the largest buffer."""
    answers = [layer.reserve(positions) for layer in past.layers]  # all are asked: they must stay of one capacity
    return all(answers)


@cache
def _growing_class(classes: Any) -> Any:  # noqa: C901 - one class, whose base is known at run time only
    import torch

    base = classes.DynamicLayer

    class GrowingLayer(base):  # type: ignore[misc,valid-type]  # a class of the user's transformers
        """A `DynamicLayer` in buffers."""

        _store: list[Any]
        _lengths: list[int]

        @classmethod
        def of(cls, layer: Any) -> Any:
            grown: Any = cls.__new__(cls)
            grown._store, grown._lengths = [None, None], [0, 0]
            for name, value in vars(layer).items():
                setattr(grown, name, value)
            return grown

        # --- what upstream reads and assigns ---

        @property
        def keys(self) -> Any:
            return self._read(0)

        @keys.setter
        def keys(self, tensor: Any) -> None:
            self._write(0, tensor)

        @property
        def values(self) -> Any:
            return self._read(1)

        @values.setter
        def values(self, tensor: Any) -> None:
            self._write(1, tensor)

        def _read(self, which: int) -> Any:
            stored = self._store[which]
            return None if stored is None else stored[..., : self._lengths[which], :]

        def _write(self, which: int, tensor: Any) -> None:
            # Assigned by cropping or reordering: the tensor itself is the buffer now, without room behind it.
            self._store[which] = tensor
            if tensor is not None and tensor.dim() >= 2:  # noqa: PLR2004 - upstream starts with an empty vector
                self._lengths[which] = tensor.shape[-2]

        # --- growing ---

        def holds(self) -> bool:
            """Whether there is a sequence in it; without making a view, for each layer is asked at each token."""
            return bool(
                getattr(self, "is_initialized", True)  # 4.54 and 4.55 know nothing of it
                and self._lengths[0] == self._lengths[1]
                and _fit(*self._store)
            )

        def reserve(self, positions: int) -> bool:
            """Room behind the last position for some more; False if that would be too long."""
            needed = self._lengths[0] + positions
            if needed > LARGEST:
                return False
            if needed >= self._store[0].shape[-2]:
                # One place always stays free: a slice of all would be contiguous, which a compiled step guards on.
                # Half as much again, so that a long sequence is not copied at every bucket.
                capacity = min(_capacity(needed, stored) for stored in self._store)
                self._store = [self._grown(stored, capacity) for stored in self._store]
            return True

        def reorder_cache(self, beam_idx: Any) -> None:
            # With the room: upstream's own code would leave none, and the next token would make all of it anew.
            if not self.holds():
                super().reorder_cache(beam_idx)
                return
            with torch.inference_mode(mode=False), torch.no_grad():  # as in `_grown`
                self._store = [stored.index_select(0, beam_idx.to(stored.device)) for stored in self._store]

        def _grown(self, stored: Any, capacity: int) -> Any:
            # Zeros, not what was there: attention multiplies what it masks, and 0 * NaN is NaN.
            shape = (*stored.shape[:-2], capacity, stored.shape[-1])
            with torch.inference_mode(mode=False):  # a sequence may be continued outside the mode it began in
                buffer = torch.zeros(shape, dtype=stored.dtype, device=stored.device)
            buffer[..., : self._lengths[0], :] = stored[..., : self._lengths[0], :]
            return buffer

        def buffers(self) -> tuple[Any, Any]:
            """The tensors behind `keys` and `values`, with their room."""
            return self._store[0], self._store[1]

        def move_to(self, keys: Any, values: Any) -> None:
            """Let the sequence lie in these buffers from here on."""
            for which, buffer in enumerate((keys, values)):
                buffer[..., : self._lengths[which], :].copy_(self._read(which))
                self._store[which] = buffer

        def length(self) -> int:
            """Positions so far."""
            return self._lengths[0]

        def advance(self, positions: int) -> None:
            """Count positions that were written into the buffers."""
            self._lengths = [length + positions for length in self._lengths]

        def mark(self) -> tuple[Any, ...]:
            """Something to recognise the layer's present state by."""
            return id(self), self._lengths[0], *(stored.data_ptr() for stored in self._store)

        def is_at(self, mark: Any) -> bool:
            """Whether the state is still that of a mark."""
            return bool(self.mark() == mark)

        def release(self) -> None:
            """Nothing was taken for a token that is not to be written after all."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            count = key_states.shape[-2]
            if not self.holds() or torch.is_grad_enabled() or not self.reserve(count):
                return super().update(key_states, value_states, *args, **kwargs)
            for stored, new in zip(self._store, (key_states, value_states), strict=True):
                stored[..., self._lengths[0] : self._lengths[0] + count, :] = new
            self.advance(count)
            return self.keys, self.values

        # --- copying ---

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self.plain(copied=True)

        def __reduce__(self) -> Any:
            return _plain_layer, (base, vars(self.plain(copied=True)))

        def plain(self, *, copied: bool) -> Any:
            """An upstream layer with the same content."""
            state = {name: value for name, value in vars(self).items() if name not in {"_store", "_lengths"}}
            for name in ("keys", "values"):
                tensor = getattr(self, name)
                state[name] = tensor.clone() if copied and tensor is not None else tensor
            return _plain_layer(base, state)

        def compared_as(self) -> list[Any]:
            """What counts when results are compared; see tuning/compare.py."""
            return [tensor.contiguous() for tensor in (self.keys, self.values) if tensor is not None]

    return GrowingLayer


def _capacity(needed: int, stored: torch.Tensor) -> int:
    """Positions for a buffer that has to hold some: half as much again, but no more room than `_MOST_ROOM`."""
    of_a_position = stored.numel() // stored.shape[-2] * stored.element_size()
    room = min(max(1, needed // 2), max(1, _MOST_ROOM // of_a_position))
    return min(LARGEST, -(-(needed + room) // _BUCKET) * _BUCKET)


def _plain_layer(base: Any, state: dict[str, Any]) -> Any:
    layer = base.__new__(base)
    vars(layer).update(state)
    return layer


def growing_layer(past: Any, number: int) -> Any:
    """The layer of a cache that a block's token goes to, if it grows and holds a sequence; `None` otherwise.

    Args:
        past: The cache, or the block's own pair of tensors.
        number: The block's place in the cache.
    """
    if isinstance(past, tuple):
        return PairLayer(*past) if _is_pair(past) else None
    classes = cache_classes()
    if classes is None:
        return _listed_layer(past, number)
    if type(past) is not classes.DynamicCache or number >= len(past.layers):
        return None
    layer = past.layers[number]
    if type(layer) is growing_class():
        return layer if layer.holds() else None
    # Made of a tuple for this call (4.54 to 4.57 take one, and some decoders still give one).
    is_plain = type(layer) is classes.DynamicLayer and _holds(layer) and not _is_processed(past)
    return PairLayer(layer.keys, layer.values, layer) if is_plain else None


def _is_processed(past: Any) -> bool:
    """Whether something is done to a cache around each update: it is moved elsewhere, or (4.54, 4.55) quantised."""
    return bool(getattr(past, "offloading", False)) or getattr(past, "cache_processor", None) is not None


# --- caches without layers -----------------------------------------------------------------------------------


class PairLayer:
    """Keys and values of one layer of a cache without growing layers; made for one token of a block.

    Args:
        keys: Of the positions so far, (rows, heads, positions, head size).
        values: Likewise.
        holder: What has the two, as its `keys` and `values`; `None` for a pair, which nobody changes.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, holder: Any = None) -> None:
        self._keys, self._values = keys, values
        self._holder = holder
        self._is_ours = False

    def buffers(self) -> tuple[Any, Any]:
        """The tensors, with the room behind them that was taken."""
        if not self._is_ours:
            return self.pair()
        return tuple(_longer(tensor, _room(tensor) + 1) for tensor in self.pair())  # type: ignore[return-value]

    def length(self) -> int:
        """Positions so far."""
        return int(self._keys.shape[2])

    def reserve(self, positions: int) -> bool:
        """Take the room behind the last position, for this token alone; False if there is none and none can be made."""
        if _take(self._keys) and min(_room(self._keys), _room(self._values)) >= positions:
            self._is_ours = True
            return True
        needed = self.length() + positions
        if self._holder is None or needed > LARGEST:
            return False
        self._keys, self._values = _roomy_pair(self._keys, self._values, needed)
        self._holder.keys, self._holder.values = self._keys, self._values
        self._is_ours = True
        return True

    def advance(self, positions: int) -> None:
        """Count positions that were written behind the tensors."""
        self._keys, self._values = (_longer(tensor, positions) for tensor in self.pair())
        _offer(self._keys)
        if self._holder is not None:
            self._holder.keys, self._holder.values = self._keys, self._values
        if isinstance(self._holder, _Listed):
            self._holder.count(positions)

    def pair(self) -> tuple[Any, Any]:
        """The keys and values so far, as the next call is given them."""
        return self._keys, self._values

    def mark(self) -> _Mark:
        """Something to recognise the layer's present state by."""
        return _Mark(weakref.ref(self._keys), weakref.ref(self._values))

    def is_at(self, mark: Any) -> bool:
        """Whether the state is still that of a mark."""
        return isinstance(mark, _Mark) and mark.keys() is self._keys and mark.values() is self._values

    def release(self) -> None:
        """Give back the room that was taken for a token that is not to be written after all."""
        _offer(self._keys)


class _Listed:
    """One layer of a cache that is two lists (before 4.54)."""

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
        """Count positions that came; the first layer's are the cache's."""
        if self._number == 0 and hasattr(self._past, "_seen_tokens"):
            self._past._seen_tokens += positions


class _Mark(NamedTuple):
    keys: Callable[[], Any]
    values: Callable[[], Any]


def release(mark: Any) -> None:
    """Give back what a layer took for a token, which was marked since, if the layer is still in use."""
    if isinstance(mark, _Mark) and (keys := mark.keys()) is not None:
        _offer(keys)


# Keys that are the newest view of a buffer with room, which nobody is about to write into. A tuple may be used twice,
# by two threads at once, too: who takes a view out of here is the only one to write behind it.
_open: dict[int, weakref.ref[Any]] = {}


def _offer(keys: torch.Tensor) -> None:
    place = id(keys)

    def forget(gone: Any) -> None:
        if _open.get(place) is gone:
            del _open[place]

    _open[place] = weakref.ref(keys, forget)


def _take(keys: torch.Tensor) -> bool:
    found = _open.pop(id(keys), None)
    return found is not None and found() is keys


def _room(tensor: torch.Tensor) -> int:
    """Positions behind a view of a buffer. One always stays free, as in a growing layer."""
    return tensor.stride(1) // max(1, tensor.stride(2)) - tensor.shape[2] - 1


def _longer(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    rows, heads, length, size = tensor.shape
    return tensor.as_strided((rows, heads, length + positions, size), tensor.stride())


def _roomy_pair(keys: torch.Tensor, values: torch.Tensor, needed: int) -> tuple[Any, Any]:
    """The same keys and values with room behind them."""
    import torch

    capacity = min(_capacity(needed, tensor) for tensor in (keys, values))
    made = []
    for tensor in (keys, values):
        rows, heads, length, size = tensor.shape
        with torch.inference_mode(mode=False):  # a sequence may be continued outside the mode it began in
            buffer = torch.zeros((rows, heads, capacity, size), dtype=tensor.dtype, device=tensor.device)
        buffer[:, :, :length] = tensor
        made.append(buffer[:, :, :length])
    return made[0], made[1]


def _is_pair(past: tuple[Any, ...]) -> bool:
    import torch

    return len(past) == 2 and all(isinstance(tensor, torch.Tensor) for tensor in past) and _fit(*past)  # noqa: PLR2004


def _listed_layer(past: Any, number: int) -> Any:
    classes = sys.modules.get("transformers.cache_utils")
    if classes is None or type(past) is not classes.DynamicCache or number >= len(past.key_cache):
        return None
    holder = _Listed(past, number)
    pair = (holder.keys, holder.values)
    return PairLayer(*pair, holder) if _is_pair(pair) else None  # a layer that was skipped is an empty list


def is_tuple(past: Any) -> bool:
    """Whether this is a cache as it was once: a tuple of a pair of tensors for each layer."""
    return isinstance(past, tuple) and bool(past) and all(isinstance(pair, tuple) and _is_pair(pair) for pair in past)


def is_listed(past: Any) -> bool:
    """Whether this is a cache with two lists, each item of which is a tensor."""
    count = len(getattr(past, "key_cache", ())) if cache_classes() is None else 0
    return count > 0 and all(_listed_layer(past, number) is not None for number in range(count))


def with_room(past: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple of pairs of the same content, each with room for a token behind it; itself, if that is there."""
    if hasattr(getattr(cache_classes(), "DynamicLayer", None), "lazy_initialization"):
        return past  # from 4.56 on a cache is made of it by copying
    found: list[tuple[Any, Any]] = []
    for keys, values in past:
        there = _open.get(id(keys))
        is_ours = there is not None and there() is keys
        if not is_ours or min(_room(keys), _room(values)) < 1:
            if keys.shape[2] + 1 > LARGEST:
                return past
            found.append(_roomy_pair(keys, values, keys.shape[2] + 1))
            _offer(found[-1][0])
        else:
            found.append((keys, values))
    return tuple(found)


def give_room(past: Any) -> Any:
    """The cache of a replayed call as it is in the middle of a loop: in normal tensors, with room behind them.

    Args:
        past: A tuple of pairs, or a cache with two lists, which gets other tensors.

    Returns:
        Another tuple; the same cache.
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


def step_cache(classes: tuple[Any, Any], keys: Any, values: Any, length: int) -> Any:
    """The cache that a traced block is given, over one layer's buffers; made inside the traced code."""
    layer, whole = classes  # given, since dynamo makes no object of a class that another class's method closes over
    return whole(layer(keys, values, length))


def step_classes() -> tuple[Any, Any]:
    """The classes that `step_cache` needs, for the transformers that is loaded; two `None` without one."""
    classes = cache_classes()
    return (None, None) if classes is None else _step_classes(classes)


@cache
def _step_classes(classes: Any) -> tuple[Any, Any]:
    class StepLayer(classes.DynamicLayer):  # type: ignore[misc]
        """One layer for one token, over the buffers of a growing layer. Made inside the traced block."""

        def __init__(self, keys: Any, values: Any, length: int) -> None:
            self.buffers = (keys, values)
            self.length = length
            self.is_initialized = True

        def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
            after = self.length + 1
            keys, values = self.buffers
            keys[:, :, self.length : after].copy_(key_states)
            values[:, :, self.length : after].copy_(value_states)
            return keys[:, :, :after], values[:, :, :after]

        def get_seq_length(self, *_args: Any) -> int:
            return self.length

        def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
            return self.length + 1, 0

    class StepCache(classes.Cache):  # type: ignore[misc]
        """The whole cache as one block sees it: whichever number the block has, its token goes to the one layer.

        So the number is nothing that a graph is guarded by, and all blocks of a row share one.
        """

        def __init__(self, layer: Any) -> None:
            self.layers = [layer]
            self.layer_class_to_replicate = None
            self.offloading = False

        def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
            return self.layers[0].update(key_states, value_states)

        def get_seq_length(self, *_args: Any) -> int:
            return self.layers[0].get_seq_length()  # type: ignore[no-any-return]

        def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
            return self.layers[0].get_mask_sizes()  # type: ignore[no-any-return]

    return StepLayer, StepCache
