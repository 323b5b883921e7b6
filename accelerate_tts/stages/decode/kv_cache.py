"""Key/value caches of transformers that grow in place.

Upstream concatenates the whole cache with each new token (`torch.cat`). With 30 layers and 500 positions this writes a
quarter of a gigabyte a token. Here keys and values lie in preallocated buffers with spare capacity, and a token is
written behind the last position.

The layers of a cache with `.layers` (transformers 4.54 and later) are replaced by layers of another class. Their `keys`
and `values` are the tensors of the positions so far, as upstream, and may be assigned. Upstream's own code for
cropping, reordering for beams, repeating, selecting and copying therefore works on them.

Before 4.54, a cache is two lists of tensors or an immutable tuple of pairs of tensors. There a tensor is a view of a
buffer with spare capacity. Only the newest view of a buffer may be extended in place; a sequence that continues from an
older view is copied first. Tensors that other code derives from a view are plain tensors.

This module does not import transformers; it uses it only if the user's model has imported it.
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
"""True while a decoder runs that was asked for its attention weights. Its blocks do not always get that argument."""
whole_tuple: ContextVar[tuple[Any, ...] | None] = ContextVar("whole_tuple", default=None)
"""The tuple of pairs that the running decoder was called with. A block of GPT-2 gets only its own pair."""

_BUCKET = 128
_MOST_ROOM = 4 << 20
"""Maximum spare bytes of a buffer: 500 positions of T3, whose cache is 60 such buffers."""
LARGEST = 16_384
"""Maximum positions of a buffer. Longer sequences use upstream's own code."""


def cache_classes() -> Any:
    """Return the module `transformers.cache_utils` if it is loaded and has cache layers, else `None`."""
    module = sys.modules.get("transformers.cache_utils")
    return module if module is not None and hasattr(module, "DynamicLayer") else None


def are_caches_loaded() -> bool:
    """Check that transformers is loaded and has a `DynamicCache`."""
    return hasattr(sys.modules.get("transformers.cache_utils"), "DynamicCache")


def is_growable(past: Any) -> bool:
    """Check that this is a non-empty `DynamicCache`, each layer of which can be a growing layer.

    Sliding-window, quantised, offloaded and static layers do not qualify, nor do caches of other classes.
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
    """Return the class of growing layers for the loaded release of transformers."""
    return _growing_class(cache_classes())


def adopt(past: Any) -> None:
    """Replace the layers of a growable cache by growing layers, in place."""
    base, growing = cache_classes().DynamicLayer, growing_class()
    for number, layer in enumerate(past.layers):
        if type(layer) is base:
            past.layers[number] = growing.of(layer)


def room_for(past: Any, positions: int) -> bool:
    """Reserve capacity for more positions in each layer of an adopted cache; False if that exceeds `LARGEST`."""
    answers = [layer.reserve(positions) for layer in past.layers]  # no short circuit: all keep the same capacity
    return all(answers)


@cache
def _growing_class(classes: Any) -> Any:  # noqa: C901 - one class, whose base is known at run time only
    import torch

    base = classes.DynamicLayer

    class GrowingLayer(base):  # type: ignore[misc,valid-type]  # a class of the user's transformers
        """A `DynamicLayer` whose keys and values are views of preallocated buffers."""

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
            # Assigned by cropping or reordering: the tensor becomes the buffer, without spare capacity.
            self._store[which] = tensor
            if tensor is not None and tensor.dim() >= 2:  # noqa: PLR2004 - upstream starts with an empty vector
                self._lengths[which] = tensor.shape[-2]

        # --- growing ---

        def holds(self) -> bool:
            """Check that the layer holds a sequence. Makes no view, since this runs for each layer at each token."""
            return bool(
                getattr(self, "is_initialized", True)  # 4.54 and 4.55 do not have it
                and self._lengths[0] == self._lengths[1]
                and _fit(*self._store)
            )

        def reserve(self, positions: int) -> bool:
            """Reserve capacity behind the last position; False if the sequence would exceed `LARGEST`."""
            needed = self._lengths[0] + positions
            if needed > LARGEST:
                return False
            if needed >= self._store[0].shape[-2]:
                # One position always stays free: a slice of the whole buffer would be contiguous, and a compiled step
                # guards on that. The capacity grows by half, so that a long sequence is not copied at every bucket.
                capacity = min(_capacity(needed, stored) for stored in self._store)
                self._store = [self._grown(stored, capacity) for stored in self._store]
            return True

        def reorder_cache(self, beam_idx: Any) -> None:
            # Reorders whole buffers: upstream's code drops the spare capacity, and the next token would reallocate.
            if not self.holds():
                super().reorder_cache(beam_idx)
                return
            with torch.inference_mode(mode=False), torch.no_grad():  # as in `_grown`
                self._store = [stored.index_select(0, beam_idx.to(stored.device)) for stored in self._store]

        def _grown(self, stored: Any, capacity: int) -> Any:
            # Zeros, not uninitialised memory: attention multiplies masked positions by 0, and 0 * NaN is NaN.
            shape = (*stored.shape[:-2], capacity, stored.shape[-1])
            with torch.inference_mode(mode=False):  # a sequence may continue outside inference mode
                buffer = torch.zeros(shape, dtype=stored.dtype, device=stored.device)
            buffer[..., : self._lengths[0], :] = stored[..., : self._lengths[0], :]
            return buffer

        def buffers(self) -> tuple[Any, Any]:
            """Return the buffers of keys and values, spare capacity included."""
            return self._store[0], self._store[1]

        def move_to(self, keys: Any, values: Any) -> None:
            """Copy the sequence into these buffers and use them from now on."""
            for which, buffer in enumerate((keys, values)):
                buffer[..., : self._lengths[which], :].copy_(self._read(which))
                self._store[which] = buffer

        def length(self) -> int:
            """Return the number of positions."""
            return self._lengths[0]

        def advance(self, positions: int) -> None:
            """Extend the length by positions that were written into the buffers."""
            self._lengths = [length + positions for length in self._lengths]

        def mark(self) -> tuple[Any, ...]:
            """Return a token of the layer's present state, for `is_at`."""
            return id(self), self._lengths[0], *(stored.data_ptr() for stored in self._store)

        def is_at(self, mark: Any) -> bool:
            """Check that the state has not changed since `mark`."""
            return bool(self.mark() == mark)

        def release(self) -> None:
            """Do nothing: `reserve` takes nothing that must be given back. `PairLayer` does."""

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
            """Return an upstream layer with the same content."""
            state = {name: value for name, value in vars(self).items() if name not in {"_store", "_lengths"}}
            for name in ("keys", "values"):
                tensor = getattr(self, name)
                state[name] = tensor.clone() if copied and tensor is not None else tensor
            return _plain_layer(base, state)

        def compared_as(self) -> list[Any]:
            """Return the tensors by which results are compared; see tuning/compare.py."""
            return [tensor.contiguous() for tensor in (self.keys, self.values) if tensor is not None]

    return GrowingLayer


def _capacity(needed: int, stored: torch.Tensor) -> int:
    """Return the capacity of a buffer for `needed` positions: half as many again, at most `_MOST_ROOM` spare bytes."""
    of_a_position = stored.numel() // stored.shape[-2] * stored.element_size()
    room = min(max(1, needed // 2), max(1, _MOST_ROOM // of_a_position))
    return min(LARGEST, -(-(needed + room) // _BUCKET) * _BUCKET)


def _plain_layer(base: Any, state: dict[str, Any]) -> Any:
    layer = base.__new__(base)
    vars(layer).update(state)
    return layer


def growing_layer(past: Any, number: int) -> Any:
    """Return the growing layer that a block's token is written to; `None` if it does not grow or holds no sequence.

    Args:
        past: The cache, or the block's own pair of tensors.
        number: The block's index in the cache.
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
    # Converted from a tuple for this call (4.54 to 4.57 accept one, and some decoders still pass one).
    is_plain = type(layer) is classes.DynamicLayer and _holds(layer) and not _is_processed(past)
    return PairLayer(layer.keys, layer.values, layer) if is_plain else None


def _is_processed(past: Any) -> bool:
    """Check for a cache that upstream offloads or, in 4.54 and 4.55, quantises around each update."""
    return bool(getattr(past, "offloading", False)) or getattr(past, "cache_processor", None) is not None


# --- caches without layers -----------------------------------------------------------------------------------


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
        if self._holder is None or needed > LARGEST:
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
    import torch

    capacity = min(_capacity(needed, tensor) for tensor in (keys, values))
    made = []
    for tensor in (keys, values):
        rows, heads, length, size = tensor.shape
        with torch.inference_mode(mode=False):  # a sequence may continue outside inference mode
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
    """Check for a legacy cache: a tuple with a pair of tensors for each layer."""
    return isinstance(past, tuple) and bool(past) and all(isinstance(pair, tuple) and _is_pair(pair) for pair in past)


def is_listed(past: Any) -> bool:
    """Check for a cache of two lists, each item of which is a tensor."""
    count = len(getattr(past, "key_cache", ())) if cache_classes() is None else 0
    return count > 0 and all(_listed_layer(past, number) is not None for number in range(count))


def with_room(past: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a tuple of pairs of the same content with capacity for one more token; pairs that have it are reused."""
    if hasattr(getattr(cache_classes(), "DynamicLayer", None), "lazy_initialization"):
        return past  # 4.56 and later copy it into a cache
    found: list[tuple[Any, Any]] = []
    for keys, values in past:
        there = open_buffers.get(id(keys))
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


def step_cache(classes: tuple[Any, Any], keys: Any, values: Any, length: int) -> Any:
    """Build a traced block's cache over one layer's buffers. Called inside the traced code."""
    layer, whole = classes  # passed in: dynamo cannot instantiate a class that another class's method closes over
    return whole(layer(keys, values, length))


def step_classes() -> tuple[Any, Any]:
    """Return the layer and cache classes for `step_cache`; two `None` without transformers 4.54 or later."""
    classes = cache_classes()
    return (None, None) if classes is None else _step_classes(classes)


@cache
def _step_classes(classes: Any) -> tuple[Any, Any]:
    class StepLayer(classes.DynamicLayer):  # type: ignore[misc]
        """One layer for one token, over the buffers of a growing layer. Created inside the traced block."""

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
        """The cache of one traced block. It ignores the block's index and writes to its only layer.

        A graph is therefore not guarded on the index, and all blocks of a decoder share one graph.
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
