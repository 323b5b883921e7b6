"""Which calls of a decoder's block are one more token for a growing cache, and which are upstream's business."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from accelerate_tts.engine.stages import growing
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CACHE_NAMES", "cache_name", "cache_of", "has_hooks", "parameters_of", "take_cache", "token_layer"]

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


def parameters_of(cls: Any) -> list[str]:
    """The names of what a class's forward takes, after `self`."""
    return [
        parameter.name
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


def token_layer(what: str, past: Any, number: int, named: dict[str, Any]) -> Any:
    """The growing layer that one token of a block goes to, with room for it; `None` for any other kind of call.

    Args:
        what: What would serve the call, for the event that says why it does not.
        past: The cache.
        number: The block's place in it.
        named: The call's other arguments; `hidden_states` of shape (rows, positions, width).
    """
    layer = growing.growing_layer(past, number)
    hidden = named.get("hidden_states")
    if layer is None or hidden is None or hidden.dim() != 3 or hidden.shape[1] != 1:  # noqa: PLR2004
        return None
    if named.get("output_attentions") or growing.attentions_wanted.get():
        emit(NotApplied(what, "attention weights are asked for"))
        return None
    if hidden.shape[0] != layer.buffers()[0].shape[0]:
        return None  # upstream's own error
    if not layer.reserve(1):
        emit(NotApplied(what, f"the sequence is longer than {growing.LARGEST} positions"))
        return None
    return layer


def has_hooks(*modules: Any) -> bool:
    """Whether a user's hooks wait for calls of some modules, which then must be called.

    transformers' own only collect attention weights, and ours only watch.
    """
    return any(map(_is_foreign, [m for m in modules if m._forward_hooks or m._forward_pre_hooks]))


def _is_foreign(module: Any) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("transformers.", "accelerate_tts.")) for hook in hooks
    )
