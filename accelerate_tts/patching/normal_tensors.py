"""Calls with normal tensors in place of inference tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["call_normally"]


def call_normally(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function outside inference mode and with normal tensors.

    dynamo guards on inference mode and on the inputs that were made in it. A graph compiled for a caller in one mode
    would otherwise not serve a caller in the other, and compiling takes half a minute. With gradients on, nothing is
    changed. In-place writes to a copied input are copied back to the caller's tensor.
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
    # Only these types: a cache or a model's own container is passed on as it is.
    if type(value) in {tuple, list}:
        return type(value)([_normal(item, copies) for item in value])
    if type(value) is dict:
        return {name: _normal(item, copies) for name, item in value.items()}
    return value
