"""Which calls of a decoder's block are one more token for a growing cache, and which are upstream's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.signatures import is_analyzer, module_of
from accelerate_tts.stages.decode import kv_cache

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CACHE_NAMES", "Told", "cache_name", "cache_of", "is_read", "is_spied", "take_cache", "tidy", "token_layer"]

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What decoders and blocks of transformers have called their cache, newest name first.

5.24.0 renamed `past_key_values` to `cache`, in arguments and in results; the old names are taken until 5.40.0.
"""


def cache_name(names: Iterable[str]) -> str | None:
    """What the cache is called among the names of a forward's parameters, or of a result's fields."""
    known = set(names)
    return next((name for name in CACHE_NAMES if name in known), None)


def cache_of(named: Any) -> Any:
    """The cache in a call's arguments or in a result, by whichever name it has there; `None` without one."""
    if not isinstance(named, dict):  # a result without fields, or of a class of the model's own
        return next((value for name in CACHE_NAMES if (value := getattr(named, name, None)) is not None), None)
    name = cache_name(named)
    return None if name is None else named[name]


def take_cache(named: dict[str, Any]) -> Any:
    """Take the cache out of a call's arguments: callers may still use an older name than the forward does."""
    found = None
    for name in CACHE_NAMES:
        value = named.pop(name, None)
        found = value if found is None else found
    return found


class Told:
    """Obstacles that somebody was told of: one event when the first block of a part meets one, until none does.

    Args:
        what: What would serve the blocks, for the events that say why it does not.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._blocks: dict[str, set[int]] = {}

    def tell(self, obstacle: str, block: int) -> None:
        """A block was not served, for a reason."""
        known = self._blocks.setdefault(obstacle, set())
        if not known:
            emit(NotApplied(self.what, obstacle))
        known.add(block)

    def is_served(self, block: int) -> None:
        """A block was served: whatever was in its way is gone."""
        if self._blocks:
            for known in self._blocks.values():
                known.discard(block)
            self._blocks = {obstacle: known for obstacle, known in self._blocks.items() if known}


def token_layer(told: Told, past: Any, number: int, named: dict[str, Any]) -> Any:
    """The growing layer that one token of a block goes to, with room for it; `None` for any other kind of call.

    Args:
        told: Who is told why it is not served.
        past: The cache, or the block's own pair of tensors.
        number: The block's place in it.
        named: The call's other arguments; `hidden_states` of shape (rows, positions, width).
    """
    layer = kv_cache.growing_layer(past, number)
    hidden = named.get("hidden_states")
    if layer is None or hidden is None or hidden.dim() != 3 or hidden.shape[1] != 1:  # noqa: PLR2004
        return None
    if hidden.shape[0] != layer.buffers()[0].shape[0]:
        return None  # upstream's own error
    if not layer.reserve(1):
        if layer.length() >= kv_cache.LARGEST:
            told.tell(f"the sequence is longer than {kv_cache.LARGEST} positions", number)
        return None
    return layer


def is_read(attention: Any) -> bool:
    """Whether somebody waits for calls of an attention layer to read the weights that it returns."""
    return bool(attention._forward_hooks) or "forward" in attention.__dict__


def is_spied(attention: Any) -> bool:
    """Whether Chatterbox's alignment analyzer reads the weights of an attention layer, who else may or may not."""
    return any(map(is_analyzer, attention._forward_hooks.values()))


def tidy(module: Any) -> None:
    """Take away what `is_capture` left behind: a module's own method, of a class that it may no longer have."""
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__self__", None) is module and forward.__name__ == "forward":
        plain = {vars(cls).get("forward") for cls in type(module).__mro__}
        if forward.__func__ in plain or module_of(forward).startswith("accelerate_tts."):
            del module.__dict__["forward"]
