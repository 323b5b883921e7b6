"""Cache of one traced block for one token, over the buffers of a growing layer."""

from __future__ import annotations

from typing import Any

from accelerate_tts.stages.decode.kv_cache.classes import CacheOfLayers, cache_classes, upstream_class


def step_cache(classes: tuple[Any, Any], keys: Any, values: Any, length: int) -> Any:
    """Build a traced block's cache over one layer's buffers. Called inside the traced code."""
    layer, whole = classes  # passed in, so that the traced code makes no class
    return whole([layer(keys, values, length)])


def step_classes() -> tuple[Any, Any]:
    """Return the layer and cache classes for `step_cache`; two `None` without transformers 4.54 or later."""
    classes = cache_classes()
    if classes is None:
        return None, None
    return upstream_class(StepLayer, classes.DynamicLayer), upstream_class(StepCache, classes.Cache)


class StepLayer:
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


class StepCache(CacheOfLayers):
    """The cache of one traced block. It ignores the block's index and writes to its only layer.

    A graph is therefore not guarded on the index, and all blocks of a decoder share one graph.
    """

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        return self.layers[0].update(key_states, value_states)

    def get_seq_length(self, *_args: Any) -> int:
        return self.layers[0].get_seq_length()  # type: ignore[no-any-return]

    def get_mask_sizes(self, *_args: Any) -> tuple[int, int]:
        return self.layers[0].get_mask_sizes()  # type: ignore[no-any-return]
