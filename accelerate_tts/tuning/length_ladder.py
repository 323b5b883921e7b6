"""Warm-up at other lengths: the ladder of lengths for `lengths=`, and resizing of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import WarmupError

if TYPE_CHECKING:
    import torch

LONGEST = 10_000_000
"""Maximum length, since the warm-up makes an input of it: seven minutes of samples at 24 kHz."""

# A compiled graph is valid for a range of lengths: oneDNN's convolutions change their kernel at powers of two, and
# dynamo's size guards follow. Steps of less than two leave no range out (docs/decisions/0004-compiling.md).
_STEP = 1.9


def ladder(lengths: tuple[int, int]) -> tuple[int, ...]:
    """Return lengths from the shortest to the longest, inclusive, each less than twice the previous (2 follows 1)."""
    rung, longest = lengths
    rungs = [rung]
    while rung < longest:
        rung = min(longest, max(rung + 1, int(rung * _STEP)))
        rungs.append(rung)
    return tuple(rungs)


def at_length(item: Any, length: int) -> Any:
    """Resize a text, a tensor, or a tuple or mapping of arguments to a length.

    A text is repeated and cut to that many characters. For tensors, the last dimension of the first one is the length,
    and every dimension of the others with the same size (a mask's, for example) is resized, too. Values are repeated.

    Raises:
        WarmupError: There is no tensor among the arguments.
    """
    if isinstance(item, str):
        text = f"{item.strip()} "
        return (text * (length // len(text) + 1))[:length].strip() or item.strip()[:1]
    first = first_tensor(item)
    if isinstance(item, Mapping):
        return {name: _resized(value, first, length) for name, value in item.items()}
    if isinstance(item, tuple):
        return tuple(_resized(value, first, length) for value in item)
    return _resized(item, first, length)


def first_tensor(item: Any) -> torch.Tensor:
    """Return the first tensor of an argument, tuple or mapping of arguments. Its last dimension is the length.

    Raises:
        WarmupError: There is none.
    """
    values = list(item.values()) if isinstance(item, Mapping) else list(item) if isinstance(item, tuple) else [item]
    for value in values:
        if is_tensor(value) and value.dim() > 0 and value.shape[-1] > 0:
            return value  # type: ignore[no-any-return]  # known by its protocol, since torch is not imported here
    raise WarmupError("lengths= needs a tensor in warmup= whose last dimension is the length; give a callable instead")


def _resized(value: Any, first: torch.Tensor, length: int) -> Any:
    import torch

    if not is_tensor(value):
        return value
    tensor: torch.Tensor = value
    before, last = first.shape[-1], tensor.dim() - 1
    for dimension, size in enumerate(tensor.shape):
        # The first dimension is a batch, even if it has the size of the length.
        same = size == before and not (dimension == 0 and last > 0)
        if dimension == last if value is first else same:
            tensor = tensor.index_select(dimension, torch.arange(length, device=tensor.device) % size)
    return tensor


def is_tensor(value: Any) -> bool:
    """Check for a tensor by its protocol, since checking a decorator's argument must not import torch."""
    return hasattr(type(value), "__torch_function__") and not callable(value)
