"""Key/value caches that grow in place, independent of the loop that drives the decoder. Bit-exact.

A loop calls the decoder once with the prompt (prefill). For each token it then passes one position and the cache that
the previous call returned. Upstream copies the whole cache at each token. Here its layers become growing layers
(kv_cache/) as soon as they hold a sequence, and a token is written behind the last one.

A decoder is a module whose forward takes a cache, `inputs_embeds` and `use_cache`, as those of transformers do. The
innermost such module of a part is changed. The caller sees a cache of upstream's own class.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from accelerate_tts.inspection.classes import class_of, plain_class
from accelerate_tts.inspection.tracing import is_traced
from accelerate_tts.kernels.weight_formats import MOST_ROWS
from accelerate_tts.patching.class_swap import ClassSwap, per_class, subclass_with
from accelerate_tts.patching.normal_tensors import call_normally
from accelerate_tts.plan import READY
from accelerate_tts.stages.base import BaseStage
from accelerate_tts.stages.catalogue import register_stage
from accelerate_tts.stages.decode import kv_cache
from accelerate_tts.stages.decode.call_args import attentions_wanted, cache_name, cache_of, tidy, whole_tuple
from accelerate_tts.stages.decode.leftovers import Leftovers

if TYPE_CHECKING:
    from torch import nn

    from accelerate_tts.plan import Part
    from accelerate_tts.stages.protocol import State

_TAKES = {"inputs_embeds", "use_cache"}


@register_stage
class GrowingCacheStage(BaseStage):
    """Lets a decoder's cache grow in place. Bit-exact."""

    name = "growing cache"
    # On CUDA, copying a cache is faster than writing a position into it (0.79x to 0.88x on an H100). Stages that need
    # growing caches bring them along.
    devices = ("cpu", "mps", "xpu")
    excluded_by: tuple[State, ...] = ("recorded",)
    # Fused blocks already have growing caches, so nothing is tried after them. For a large decoder in eager PyTorch the
    # gain is a per cent or two, and a certain verdict takes a fifth of the budget.
    after = ("fused decoder blocks", "fused sequence blocks", "captured decode step")

    def applies(self, part: Part) -> str | None:
        if kv_cache.cache_classes() is None:
            return "no cache of transformers 4.54 or later is loaded"
        found = decoders(part.module)
        if found and all(getattr(class_of(decoder), READY, None) is _make_ready for decoder in found):
            return "its caches grow in place already, as fused blocks need them to"
        return None if found else "no decoder with a cache in it"

    def prepare(self, part: Part) -> ClassSwap:
        return growing_caches(part.module)


def growing_caches(module: nn.Module) -> ClassSwap:
    """Return the change that lets the caches of all decoders in a module grow; without a decoder it changes nothing."""
    return ClassSwap(decoders(module), lambda decoder: _decoding_class(class_of(decoder)))


def decoders(module: nn.Module) -> list[nn.Module]:
    """Return the innermost modules of a part whose forward takes a cache."""
    found = [inner for inner in module.modules() if _is_decoder(inner)]
    return [
        outer for outer in found
        if not any(inner is not outer and _is_decoder(inner) for inner in outer.modules())
    ]  # fmt: skip


def _is_decoder(module: Any) -> bool:
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return False
    names = _parameters(plain_class(module))
    return _TAKES.issubset(names) and cache_name(names) is not None


def _parameters(cls: Any) -> list[str]:
    """Return the parameter names of a class's forward without `self`; an empty list if it takes `*args`."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return []
    return [parameter.name for parameter in parameters]


@per_class
def _decoding_class(plain: Any) -> type:
    names = _parameters(plain)
    left: WeakKeyDictionary[Any, Leftovers] = WeakKeyDictionary()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or self.training or is_traced():
            return plain.forward(self, *args, **kwargs)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        past = cache_of(named)
        if past is None:
            left.setdefault(self, Leftovers()).tidy(self)
        elif kv_cache.is_tuple(past):
            if past[0][0].shape[0] <= MOST_ROWS and _is_token(named):
                past = kv_cache.with_room(past)
                args, kwargs = _with_cache(names, args, kwargs, past)
        elif kv_cache.is_growable(past):
            kv_cache.adopt(past)
        asked = named.get("output_attentions")
        asked = bool(getattr(self.config, "output_attentions", False) if asked is None else asked)
        told = (
            attentions_wanted.set(asked),
            whole_tuple.set(past if isinstance(past, tuple) else None),
        )
        try:
            # Converts inference tensors once, so that no block has to.
            result = call_normally(partial(plain.forward, self), args, kwargs)
        finally:
            attentions_wanted.reset(told[0])
            whole_tuple.reset(told[1])
            if _captures_by_patching():
                for inner in self.modules():
                    tidy(inner)
        after = cache_of(result)
        if after is not past and kv_cache.is_growable(after):
            kv_cache.adopt(after)
        return result

    cls = subclass_with(plain, forward)
    setattr(cls, READY, staticmethod(_make_ready))
    return cls


def _captures_by_patching() -> bool:
    """Check for transformers 4.54 to 4.57, which patch `forward` of modules to collect outputs and do not undo it."""
    generic: Any = sys.modules.get("transformers.utils.generic")
    return hasattr(generic, "check_model_inputs") and "transformers.utils.output_capturing" not in sys.modules


def _is_token(named: dict[str, Any]) -> bool:
    given = named.get("inputs_embeds")
    given = named.get("input_ids") if given is None else given
    return given is not None and given.dim() > 1 and given.shape[1] == 1


def _with_cache(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], past: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the cache replaced."""
    name = cache_name(kwargs)
    if name is not None and kwargs[name] is not None:
        return args, {**kwargs, name: past}
    place = names.index(cache_name(names) or "")
    return (*args[:place], past, *args[place + 1 :]), kwargs


def _make_ready(value: Any) -> Any:
    """Return a replayed call's argument; a cache in its state in the middle of a loop."""
    if kv_cache.is_growable(value):
        kv_cache.adopt(value)
        kv_cache.room_for(value, 1)
    elif kv_cache.is_tuple(value) or kv_cache.is_listed(value):
        return kv_cache.give_room(value)
    return value
