"""Cache deltas: the outputs of a decoder's call without the cache that it was called with.

A decoder returns the cache of its input, one position longer. For Chatterbox's T3 that is a hundred megabytes, of which
a call computes half a megabyte. Storing a few whole caches for comparison would dominate the memory of tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_PAIR = ("keys", "values")


class CacheDelta:
    """The positions that a call added to its cache.

    Args:
        tensors: The added positions of each tensor of each layer, with the norm of the earlier ones appended. A
            relative error is then that of the whole tensor.
        kept: 1 plus the largest relative change of the earlier positions; 1 if none was written.
    """

    def __init__(self, tensors: list[torch.Tensor], kept: torch.Tensor) -> None:
        self._tensors = tensors
        self._kept = kept

    def compared_as(self) -> list[torch.Tensor]:
        """Return the tensors by which results are compared; see compare.py."""
        return [*self._tensors, self._kept]


def is_cache(value: Any) -> bool:
    """Check for a key/value cache of any class."""
    return callable(getattr(value, "get_seq_length", None))


def is_past(value: Any) -> bool:
    """Check for a decoder's past sequence: a cache, or a tuple of pairs of tensors."""
    return is_cache(value) or (type(value) is tuple and bool(_tensors(value)))


def without_past(output: Any, given: tuple[Any, ...]) -> Any:
    """Replace the cache in a call's output by its delta, if it is an extension of the cache among the arguments.

    Args:
        output: The call's output.
        given: The arguments with their content before the call.

    Returns:
        An output of the same kind; `output` itself without such a cache.
    """
    before = next((tensors for value in given if (tensors := _tensors(value))), None)
    if before is None:
        return output
    if isinstance(output, Mapping):
        fields = {name: _added(value, before) for name, value in output.items()}
        return type(output)(**fields)  # transformers' outputs have fields as attributes, too
    if type(output) in {tuple, list}:
        return type(output)(_added(value, before) for value in output)
    return output


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return the tensors of a cache, with positions in the second-last dimension; an empty list for other objects.

    A cache has layers (transformers 4.54 and later) or two lists of tensors, or is a tuple of pairs of tensors.
    """
    pairs: list[tuple[Any, ...]] = []
    if type(cache) is tuple:
        pairs = [pair for pair in cache if isinstance(pair, tuple) and len(pair) == len(_PAIR)]
        pairs = pairs if len(pairs) == len(cache) else []
    elif is_cache(cache):
        layers = getattr(cache, "layers", None)
        if layers is not None:
            pairs = [tuple(getattr(layer, name, None) for name in _PAIR) for layer in layers]
        else:
            pairs = list(zip(getattr(cache, "key_cache", ()), getattr(cache, "value_cache", ()), strict=False))
    found = [tensor for pair in pairs for tensor in pair]
    if not all(isinstance(tensor, torch.Tensor) and tensor.dim() == 4 for tensor in found):  # noqa: PLR2004
        return []
    return found


def _added(value: Any, before: list[torch.Tensor]) -> Any:
    after = _tensors(value)
    if len(after) != len(before) or not all(_goes_on(a, b) for a, b in zip(after, before, strict=True)):
        return value
    tensors, worst = [], 0.0
    with torch.inference_mode():
        for now, then in zip(after, before, strict=True):
            count = then.shape[-2]
            tensors.append(torch.cat([now[..., count:, :].flatten(), torch.linalg.vector_norm(then).view(1)]))
            worst = max(worst, _error(now[..., :count, :], then))
        return CacheDelta(tensors, torch.tensor(1.0 + worst, dtype=torch.float64))


def _goes_on(now: torch.Tensor, then: torch.Tensor) -> bool:
    return (
        now.dtype == then.dtype
        and (now.shape[:-2], now.shape[-1]) == (then.shape[:-2], then.shape[-1])
        and now.shape[-2] > then.shape[-2]
    )


def _error(now: torch.Tensor, then: torch.Tensor) -> float:
    if torch.equal(now, then):
        return 0.0
    norm = float(torch.linalg.vector_norm(then.float()))
    error = float(torch.linalg.vector_norm(now.float() - then.float()))
    return error / norm if norm > 0.0 else float("inf")
