"""Key/value caches of transformers that grow in place.

Upstream concatenates the whole cache with each new token (`torch.cat`). With 30 layers and 500 positions this writes a
quarter of a gigabyte a token. Here keys and values lie in preallocated buffers with spare capacity, and a token is
written behind the last position.

`layers.py` has the layers of caches since transformers 4.54, `pairs.py` the tensors of earlier caches, and `step.py`
the cache of a compiled decode step. transformers is not imported; it is used only if the user's model has imported it.
"""

from __future__ import annotations

from typing import Any

from accelerate_tts.stages.decode.kv_cache.classes import (
    CacheOfLayers,
    are_caches_loaded,
    cache_classes,
    is_processed,
    upstream_class,
)
from accelerate_tts.stages.decode.kv_cache.layers import (
    Begun,
    adopt,
    growing_class,
    holds,
    is_empty,
    is_growable,
    is_growing,
    room_for,
)
from accelerate_tts.stages.decode.kv_cache.pairs import (
    PairLayer,
    give_room,
    is_listed,
    is_pair,
    is_tuple,
    listed_layer,
    open_buffers,
    release,
    with_room,
)
from accelerate_tts.stages.decode.kv_cache.step import step_cache, step_classes

__all__ = [
    "Begun",
    "CacheOfLayers",
    "PairLayer",
    "adopt",
    "are_caches_loaded",
    "cache_classes",
    "give_room",
    "growing_class",
    "growing_layer",
    "is_empty",
    "is_growable",
    "is_growing",
    "is_listed",
    "is_tuple",
    "layer_at",
    "open_buffers",
    "release",
    "room_for",
    "step_cache",
    "step_classes",
    "upstream_class",
    "with_room",
]


def growing_layer(past: Any, number: int) -> Any:
    """Return the growing layer that a block's token is written to; `None` if it does not grow or holds no sequence.

    Args:
        past: The cache, or the block's own pair of tensors.
        number: The block's index in the cache.
    """
    if isinstance(past, tuple):
        return PairLayer(*past) if is_pair(past) else None
    classes = cache_classes()
    if classes is None:
        return listed_layer(past, number)
    if type(past) is not classes.DynamicCache or number >= len(past.layers):
        return None
    layer = past.layers[number]
    if is_growing(layer):
        return layer if layer.holds() else None
    # Converted from a tuple for this call (4.54 to 4.57 accept one, and some decoders still pass one).
    is_plain = type(layer) is classes.DynamicLayer and holds(layer) and not is_processed(past)
    return PairLayer(layer.keys, layer.values, layer) if is_plain else None


def layer_at(past: Any, number: int, mark: Any) -> Any:
    """Return a growing layer whose state has not changed since its `mark()`, else `None`.

    Args:
        past: The cache, or the block's own pair of tensors.
        number: The block's index in the cache.
        mark: The mark.
    """
    layers = getattr(past, "layers", None)
    if layers is None or number >= len(layers) or not is_growing(layers[number]):
        layer = growing_layer(past, number)
        return layer if layer is not None and layer.is_at(mark) else None
    return layers[number] if layers[number].is_at(mark) else None
