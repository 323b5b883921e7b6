"""Calls with normal tensors in place of inference tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def call_normally(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function outside inference mode and with normal tensors.

    dynamo guards on inference mode and on the inputs that were made in it. A graph compiled for a caller in one mode
    would otherwise not serve a caller in the other, and compiling takes half a minute. With gradients on, nothing is
    changed. In-place writes to a copied input are copied back to the caller's tensor. A cache of transformers that was
    filled in inference mode (a static one is written in place) gets normal tensors, once.
    """
    copies: list[tuple[Any, Any, int]] = []
    args, kwargs = _normal(args, copies), _normal(kwargs, copies)
    if not copies and not torch.is_inference_mode_enabled():
        return function(*args, **kwargs)
    with torch.inference_mode(mode=False), torch.no_grad():
        result = function(*args, **kwargs)
    for original, copy, version in copies:
        if copy._version != version:
            with torch.inference_mode():
                original.copy_(copy)
    return result


def _normal(value: Any, copies: list[tuple[Any, Any, int]]) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            return value
        with torch.inference_mode(mode=False):
            copy = value.clone()
        copies.append((value, copy, copy._version))  # a clone of an inference tensor may start with version 1
        return copy
    # Only these types: a model's own container is passed on as it is.
    if type(value) in {tuple, list}:
        return type(value)([_normal(item, copies) for item in value])
    if type(value) is dict:
        return {name: _normal(item, copies) for name, item in value.items()}
    # A block of a decoder is called so for each token: what cannot be a cache is let through first.
    if value is not None and not isinstance(value, (int, float, str, torch.nn.Module)) and _is_cache(value):
        _make_normal(value)
    return value


def _is_cache(value: Any) -> bool:
    """Check for a cache of transformers that may be written in place.

    Keys and values of a `DynamicCache` never are. States of convolutions and recurrences in it are, since 5.x.
    """
    classes = sys.modules.get("transformers.cache_utils")
    cache = getattr(classes, "Cache", None)
    if cache is None or not isinstance(value, cache):
        return False
    return type(value) is not getattr(classes, "DynamicCache", None) or any(map(_has_states, _layers(value)))


def _layers(cache: Any) -> list[Any]:
    layers = vars(cache).get("layers")
    return layers if isinstance(layers, list) else []


def _has_states(layer: Any) -> bool:
    return "conv_states" in vars(layer)


def _make_normal(cache: Any) -> None:
    """Replace inference tensors in the attributes of a cache and its layers. The cache itself stays."""
    for name, value in vars(cache).items():
        if _is_cache(value):  # of an encoder-decoder, which holds two
            _make_normal(value)
        else:
            _make_item_normal(cache, name, value)
    for layer in _layers(cache):
        for name, value in vars(layer).items():
            _make_item_normal(layer, name, value)


def _make_item_normal(holder: Any, name: str, value: Any) -> None:
    if isinstance(value, list):  # in earlier releases, of tensors
        value[:] = map(_without_inference, value)
    elif isinstance(value, dict):  # of states
        value.update({key: _without_inference(state) for key, state in value.items()})
    elif value is not (made := _without_inference(value)):
        setattr(holder, name, made)


def _without_inference(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_inference():
        with torch.inference_mode(mode=False):
            return value.clone()
    return value
