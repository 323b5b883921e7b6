"""Arguments of a decoder block's call: finds its cache and recognises decode steps that a growing cache can serve."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from accelerate_tts.events import NotApplied, emit
from accelerate_tts.inspection.signatures import is_analyzer, module_of
from accelerate_tts.stages.decode.kv_cache import growing_layer, sizes

if TYPE_CHECKING:
    from collections.abc import Iterable

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names of the cache in decoders and blocks of transformers, newest first.

5.24.0 renamed `past_key_values` to `cache`, in arguments and in results; the old names are accepted until 5.40.0.
"""

attentions_wanted: ContextVar[bool] = ContextVar("attentions_wanted", default=False)
"""True while a decoder runs that was asked for its attention weights. Its blocks do not always get that argument."""
whole_tuple: ContextVar[tuple[Any, ...] | None] = ContextVar("whole_tuple", default=None)
"""The tuple of pairs that the running decoder was called with. A block of GPT-2 gets only its own pair."""


def attention_of(config: Any) -> str | None:
    """Return the name of a model's attention function, which transformers (4.36 to 5.x) has under a private name."""
    return getattr(config, "_attn_implementation", None)


def cache_name(names: Iterable[str]) -> str | None:
    """Return the cache's name among a forward's parameters or a result's fields."""
    known = set(names)
    return next((name for name in CACHE_NAMES if name in known), None)


def cache_of(named: Any) -> Any:
    """Return the cache in a call's arguments or in a result, under any of its names; `None` without one."""
    if not isinstance(named, dict):  # a result without fields, or of a custom class
        return next((value for name in CACHE_NAMES if (value := getattr(named, name, None)) is not None), None)
    name = cache_name(named)
    return None if name is None else named[name]


def take_cache(named: dict[str, Any]) -> Any:
    """Remove the cache from a call's arguments and return it. Callers may use an older name than the forward."""
    found = None
    for name in CACHE_NAMES:
        value = named.pop(name, None)
        found = value if found is None else found
    return found


class Obstacles:
    """Obstacles that were reported. The first block of a part that meets one emits an event.

    It is reported again only after all blocks that met it have been served meanwhile.

    Args:
        what: Name of the optimisation in events.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._blocks: dict[str, set[int]] = {}

    def report(self, obstacle: str, block: int) -> None:
        """Report that a block was not served."""
        known = self._blocks.setdefault(obstacle, set())
        if not known:
            emit(NotApplied(self.what, obstacle))
        known.add(block)

    def served(self, block: int) -> None:
        """Note that a block was served, which ends its obstacles."""
        if self._blocks:
            for known in list(self._blocks.values()):  # another thread may report meanwhile
                known.discard(block)
            self._blocks = {obstacle: known for obstacle, known in list(self._blocks.items()) if known}


def token_layer(obstacles: Obstacles, past: Any, number: int, named: dict[str, Any]) -> Any:
    """Return the growing layer for one token of a block, with capacity reserved; `None` for any other call.

    Args:
        obstacles: Reports why a call is not served.
        past: The cache, or the block's own pair of tensors.
        number: The block's index in it.
        named: The call's other arguments; `hidden_states` has shape (batch, positions, width).
    """
    layer = growing_layer(past, number)
    hidden = named.get("hidden_states")
    if layer is None or hidden is None or hidden.dim() != 3 or hidden.shape[1] != 1:  # noqa: PLR2004
        return None
    if hidden.shape[0] != layer.buffers()[0].shape[0]:
        return None  # upstream raises its own error
    if not layer.reserve(1):
        if layer.length() >= sizes.LARGEST:
            obstacles.report(f"the sequence is longer than {sizes.LARGEST} positions", number)
        return None
    return layer


def is_read(attention: Any) -> bool:
    """Check for hooks or a patched `forward` on an attention layer, which may read the weights that it returns."""
    return bool(attention._forward_hooks) or "forward" in attention.__dict__


def is_spied(attention: Any) -> bool:
    """Check for a hook of Chatterbox's alignment analyzer, which reads the weights of an attention layer."""
    return any(map(is_analyzer, attention._forward_hooks.values()))


def tidy(module: Any) -> None:
    """Delete a `forward` that transformers, or an alignment analyzer, left in a module's `__dict__`.

    That of transformers is the module's own method, bound while the module may have had another class. That of the
    analyzer of Chatterbox 0.1.1 and 0.1.2 asks for attention weights, which their loops ask for anyway. It calls the
    one of the request before, so that after a thousand requests Python's stack overflows.
    """
    forward = vars(module).get("forward")
    if forward is not None and is_analyzer(forward):
        del module.__dict__["forward"]
    elif forward is not None and getattr(forward, "__self__", None) is module and forward.__name__ == "forward":
        plain = {vars(cls).get("forward") for cls in type(module).__mro__}
        if forward.__func__ in plain or module_of(forward).startswith("accelerate_tts."):
            del module.__dict__["forward"]
