"""Call a function with ordinary tensors where it is given inference tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["call_normally"]


def call_normally(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function outside inference mode and with normal tensors, whatever mode the caller is in.

    dynamo guards on the mode and on which inputs were made in it, so a graph that was compiled for one caller would not
    serve the other: a frozen one never, since half a minute of compiling is no answer to a request. With gradients on,
    nothing is changed. What the function writes into an input is written into the caller's own too.
    """
    import torch

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
    import torch

    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            return value
        with torch.inference_mode(mode=False):
            copy = value.clone()
        copies.append((value, copy, copy._version))  # a copy of an inference tensor counts its own making as a write
        return copy
    # Of these types only: a cache or a model's own container is passed on as it is.
    if type(value) in {tuple, list}:
        return type(value)([_normal(item, copies) for item in value])
    if type(value) is dict:
        return {name: _normal(item, copies) for name, item in value.items()}
    return value
