"""Growing layers of a cache with `.layers` (transformers 4.54 and later).

Their `keys` and `values` are the tensors of the positions so far, as upstream, and may be assigned. Upstream's own code
for cropping, reordering for beams, repeating, selecting and copying therefore works on them.
"""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any, ClassVar

import torch

from accelerate_tts.stages.decode.kv_cache import sizes
from accelerate_tts.stages.decode.kv_cache.classes import cache_classes, fit, is_processed

_OWN = {"_store", "_lengths", "_is_begun"}


def is_growable(past: Any) -> bool:
    """Check that this is a non-empty `DynamicCache`, each layer of which can be a growing layer.

    Sliding-window, quantised, offloaded and static layers do not qualify, nor do caches of other classes.
    """
    classes = cache_classes()
    if classes is None or type(past) is not classes.DynamicCache or is_processed(past):
        return False
    plain: Any = classes.DynamicLayer
    growing: Any = growing_class()
    return bool(past.layers) and all(
        (type(layer) is growing and layer.holds()) or (type(layer) is plain and holds(layer)) for layer in past.layers
    )


def is_empty(past: Any) -> bool:
    """Check that this is a `DynamicCache` without a sequence, whose layers would be plain ones."""
    classes = cache_classes()
    if classes is None or type(past) is not classes.DynamicCache or is_processed(past):
        return False
    plain: Any = classes.DynamicLayer
    return all(type(layer) is plain and not holds(layer) and layer.get_seq_length() == 0 for layer in past.layers)


def holds(layer: Any) -> bool:
    """Check that one of upstream's layers holds a sequence."""
    return bool(getattr(layer, "is_initialized", True)) and fit(layer.keys, layer.values)


def growing_class() -> Any:
    """Return the class of growing layers for the loaded release of transformers."""
    return _growing_class(cache_classes().DynamicLayer)


@cache
def _growing_class(base: Any) -> Any:
    # With upstream's as its only base, so that a layer of upstream's can become one: CPython compares layouts.
    members = {name: value for name, value in vars(GrowingLayer).items() if name not in {"__dict__", "__weakref__"}}
    return type(base)(GrowingLayer.__name__, (base,), {**members, "base": base})


def is_growing(layer: Any) -> bool:
    """Check for a growing layer."""
    return cache_classes() is not None and type(layer) is growing_class()


def adopt(past: Any) -> None:
    """Make the layers of a growable cache growing layers. They stay the same objects, which others may hold."""
    base, growing = cache_classes().DynamicLayer, growing_class()
    for layer in past.layers:
        if type(layer) is base:
            growing.become(layer, [layer.keys, layer.values], [layer.keys.shape[-2], layer.values.shape[-2]])


class Begun:
    """Layers of an empty cache, made growing ones over given buffers for a prompt that fills them.

    Args:
        past: An empty `DynamicCache`. Without layers, it gets as many as there are buffers.
        state: `state()` of a layer of such a cache.
        buffers: Keys and values of each layer.
    """

    def __init__(self, past: Any, state: dict[str, Any], buffers: list[tuple[Any, Any]]) -> None:
        self._past, self._base = past, cache_classes().DynamicLayer
        self._are_new = not past.layers
        layers = [self._base() for _ in buffers] if self._are_new else list(past.layers)
        self._before = [(layer, dict(vars(layer))) for layer, _ in zip(layers, buffers, strict=False)]
        for layer, pair in zip(layers, buffers, strict=False):
            vars(layer).update(state)
            growing_class().become(layer, list(pair), [0, 0])
            layer._is_begun = True
        past.layers[:] = layers

    def end(self) -> None:
        """Have those layers that were not filled as they were before, as upstream's are after a prompt that failed."""
        layers = self._past.layers
        for layer, state in self._before:
            if is_growing(layer) and not layer.length():
                vars(layer).update(state)
                layer.__class__ = self._base
                for name in vars(layer).keys() - state.keys():
                    delattr(layer, name)
        while self._are_new and layers and any(layers[-1] is layer for layer, _ in self._before):
            if is_growing(layers[-1]):
                break
            del layers[-1]


def room_for(past: Any, positions: int) -> bool:
    """Reserve capacity for more positions in each layer of an adopted cache; False if one exceeds `LARGEST`."""
    answers = [layer.reserve(positions) for layer in past.layers]  # no short circuit: all keep the same capacity
    return all(answers)


class GrowingLayer:
    """Members, by `growing_class`, of a `DynamicLayer` whose keys and values are views of preallocated buffers.

    Attributes:
        base: The `DynamicLayer` of the loaded release.
    """

    base: ClassVar[Any]

    _store: list[Any]
    _lengths: list[int]

    @classmethod
    def become(cls, layer: Any, store: list[Any], lengths: list[int]) -> None:
        """Make one of upstream's layers a growing one over these buffers. It can be read at any moment meanwhile."""
        state = vars(layer)
        state["_store"], state["_lengths"] = store, lengths
        layer.__class__ = cls
        for name in ("keys", "values"):  # which the properties hide
            del state[name]

    def state(self) -> dict[str, Any]:
        """Return the attributes besides keys and values, such as upstream's dtype and device."""
        return {name: value for name, value in vars(self).items() if name not in _OWN}

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
        # Upstream starts with an empty vector, also after a reset.
        return stored if stored is None or stored.dim() < 2 else stored[..., : self._lengths[which], :]  # noqa: PLR2004

    def _write(self, which: int, tensor: Any) -> None:
        # Assigned by cropping or reordering: the tensor becomes the buffer, without spare capacity.
        self._store[which] = tensor
        self._lengths[which] = 0 if tensor is None or tensor.dim() < 2 else tensor.shape[-2]  # noqa: PLR2004

    # --- growing ---

    def holds(self) -> bool:
        """Check that the layer holds a sequence. Makes no view, since this runs for each layer at each token."""
        return bool(
            getattr(self, "is_initialized", True)  # 4.54 and 4.55 do not have it
            and self._lengths[0] == self._lengths[1]
            and fit(*self._store)
        )

    def reserve(self, positions: int) -> bool:
        """Reserve capacity behind the last position; False if the sequence would exceed `LARGEST`."""
        needed = self._lengths[0] + positions
        if needed > sizes.LARGEST:
            return False
        if needed >= self._store[0].shape[-2]:
            # One position always stays free: a slice of the whole buffer would be contiguous, and a compiled step
            # guards on that. The capacity grows by half, so that a long sequence is not copied at every bucket.
            capacity = min(sizes.capacity_for(needed, stored) for stored in self._store)
            self._store = [self._grown(stored, capacity) for stored in self._store]
        return True

    def reorder_cache(self, beam_idx: Any) -> None:
        # Reorders whole buffers: upstream's code drops the spare capacity, and the next token would reallocate.
        if not self.holds():
            self.base.reorder_cache(self, beam_idx)
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

    def return_to(self, keys: Any, values: Any) -> None:
        """Use these buffers again where the sequence is a view of their first positions, as a cropped one's is."""
        for which, buffer in enumerate((keys, values)):
            stored = self._store[which]
            same = stored.untyped_storage()._cdata == buffer.untyped_storage()._cdata
            if same and _place(stored) == _place(buffer):
                self._store[which] = buffer

    def length(self) -> int:
        """Return the number of positions."""
        return self._lengths[0]

    def advance(self, positions: int) -> None:
        """Extend the length by positions that were written into the buffers."""
        keys, values = self._lengths
        self._lengths = [keys + positions, values + positions]

    def shorten(self, length: int) -> None:
        """Have a length from before the last positions again. What is behind it is written anew."""
        self._lengths = [length, length]

    def mark(self) -> tuple[Any, ...]:
        """Return a token of the layer's present state, for `is_at`."""
        keys, values = self._store
        return id(self), self._lengths[0], keys.data_ptr(), values.data_ptr()

    def is_at(self, mark: Any) -> bool:
        """Check that the state has not changed since `mark`."""
        return bool(self.mark() == mark)

    def release(self) -> None:
        """Do nothing: `reserve` takes nothing that must be given back. `PairLayer` does."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        count = key_states.shape[-2]
        new = (key_states, value_states)
        if vars(self).pop("_is_begun", False) and not all(map(_continues, self._store, new)):
            self._begin_anew()
        # Upstream's own code raises its own error for another shape, and promotes another dtype.
        if (
            not self.holds() or torch.is_grad_enabled()
            or not all(map(_continues, self._store, new)) or not self.reserve(count)
        ):  # fmt: skip
            return self.base.update(self, key_states, value_states, *args, **kwargs)
        for stored, states in zip(self._store, new, strict=True):
            stored[..., self._lengths[0] : self._lengths[0] + count, :] = states
        self.advance(count)
        return self.keys, self.values

    def _begin_anew(self) -> None:
        """Have no buffers, as one of upstream's layers: states of another kind than expected are written to it."""
        for name, value in vars(self.base()).items():
            setattr(self, name, value)

    # --- copying ---

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.plain(copied=True)

    def __reduce__(self) -> Any:
        # By Python's own function, so that a pickle can be loaded where this package is not installed.
        return copyreg._reconstructor, (self.base, object, None), vars(self.plain(copied=True))  # type: ignore[attr-defined]

    def plain(self, *, copied: bool) -> Any:
        """Return an upstream layer with the same content."""
        state = self.state()
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            state[name] = tensor.clone() if copied and tensor is not None else tensor
        return _plain_layer(self.base, state)

    def compared_as(self) -> list[Any]:
        """Return the tensors by which results are compared; see tuning/compare.py."""
        return [tensor.contiguous() for tensor in (self.keys, self.values) if tensor is not None]


def _continues(stored: Any, states: Any) -> bool:
    """Check that states differ from a buffer in the number of positions only."""
    return bool(
        stored.dtype == states.dtype and stored.shape[:-2] == states.shape[:-2] and stored.shape[-1] == states.shape[-1]
    )


def _place(tensor: Any) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.stride(), tensor.dtype, tensor.shape[:-2], tensor.shape[-1]


def _plain_layer(base: Any, state: dict[str, Any]) -> Any:
    layer = base.__new__(base)
    vars(layer).update(state)
    return layer
