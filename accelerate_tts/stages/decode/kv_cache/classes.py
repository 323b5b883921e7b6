"""Cache classes of the loaded release of transformers.

transformers is not imported here; it is used only if the user's model has imported it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar


def cache_classes() -> Any:
    """Return the module `transformers.cache_utils` if it is loaded and has cache layers, else `None`."""
    module = sys.modules.get("transformers.cache_utils")
    return module if module is not None and hasattr(module, "DynamicLayer") else None


@cache
def upstream_class(members: Any, base: Any) -> Any:
    """Return a class with the given members that derives from a class of the loaded release of transformers.

    Upstream checks for its own classes. They cannot be bases in a file: transformers is imported by users alone.
    """
    return type(members.__name__, (members, base), {"base": base})


class CacheOfLayers:
    """Members of a `Cache` that has the given layers.

    Attributes:
        base: The `Cache` of the loaded release.
    """

    base: ClassVar[Any]

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.layer_class_to_replicate = None
        self.offloading = False


def are_caches_loaded() -> bool:
    """Check that transformers is loaded and has a `DynamicCache`."""
    return hasattr(sys.modules.get("transformers.cache_utils"), "DynamicCache")


def fit(keys: Any, values: Any) -> bool:
    """Check that keys and values are those of one layer and hold a sequence."""
    if keys is None or values is None:
        return False
    # Heads may be wider in values than in keys; batch, heads and positions must agree.
    return bool(keys.dim() == 4 and keys.numel() > 0 and keys.shape[:-1] == values.shape[:-1])  # noqa: PLR2004


def is_processed(past: Any) -> bool:
    """Check for a cache that upstream offloads or, in 4.54 and 4.55, quantises around each update."""
    return bool(getattr(past, "offloading", False)) or getattr(past, "cache_processor", None) is not None
