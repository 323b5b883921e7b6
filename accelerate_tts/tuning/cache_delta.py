"""Outputs of a call of a part, without what it was given.

A decoder returns the cache that it was called with, one position longer: of Chatterbox's T3 a hundred megabytes, of
which a call made half of one. A few such results to compare, of the untouched part and of each change, would be what
tuning needs the most memory for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["is_cache", "settled"]

_PAIR = ("keys", "values")


class Added:
    """A cache that a call was given and has gone on with.

    Args:
        tensors: What it added to each tensor of each layer, and as one more number the norm of what was there before:
            a relative error is then that of the whole tensor.
        kept: How far the positions that it was given are from what they were: 1 plus the largest relative error, which
            is 1 where nothing wrote to them.
    """

    def __init__(self, tensors: list[torch.Tensor], kept: torch.Tensor) -> None:
        self._tensors = tensors
        self._kept = kept

    def compared_as(self) -> list[torch.Tensor]:
        """Tensors that count when results are compared; see compare.py."""
        return [*self._tensors, self._kept]


def is_cache(value: Any) -> bool:
    """Tell if a value is a key/value cache, of whichever class."""
    return callable(getattr(value, "get_seq_length", None))


def settled(output: Any, given: tuple[Any, ...]) -> Any:
    """A call's output with the cache in it, if it is the one that was given and longer now, as what was added to it.

    Args:
        output: What the call returned.
        given: Its arguments as they were before it.

    Returns:
        An output of the same kind; `output` itself where there is no such cache.
    """
    before = next((tensors for value in given if (tensors := _tensors(value))), None)
    if before is None:
        return output
    if isinstance(output, Mapping):
        fields = {name: _added(value, before) for name, value in output.items()}
        return type(output)(**fields)  # of transformers, whose fields are attributes as well
    if type(output) in {tuple, list}:
        return type(output)(_added(value, before) for value in output)
    return output


def _tensors(cache: Any) -> list[torch.Tensor]:
    """The tensors of a cache, each with positions in its last dimension but one; none of another thing.

    A cache has layers (transformers 4.54 and later), or two lists of tensors, or is a tuple of pairs of them.
    """
    import torch

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
    import torch

    after = _tensors(value)
    if len(after) != len(before) or not all(_goes_on(a, b) for a, b in zip(after, before, strict=True)):
        return value
    tensors, worst = [], 0.0
    with torch.inference_mode():
        for now, then in zip(after, before, strict=True):
            count = then.shape[-2]
            tensors.append(torch.cat([now[..., count:, :].flatten(), torch.linalg.vector_norm(then).view(1)]))
            worst = max(worst, _error(now[..., :count, :], then))
        return Added(tensors, torch.tensor(1.0 + worst, dtype=torch.float64))


def _goes_on(now: torch.Tensor, then: torch.Tensor) -> bool:
    return (
        now.dtype == then.dtype
        and (now.shape[:-2], now.shape[-1]) == (then.shape[:-2], then.shape[-1])
        and now.shape[-2] > then.shape[-2]
    )


def _error(now: torch.Tensor, then: torch.Tensor) -> float:
    import torch

    if torch.equal(now, then):
        return 0.0
    norm = float(torch.linalg.vector_norm(then.float()))
    error = float(torch.linalg.vector_norm(now.float() - then.float()))
    return error / norm if norm > 0.0 else float("inf")
