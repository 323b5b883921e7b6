"""Arguments and results of a recorded call: its signature, the buffers that it reads, and copies of what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from accelerate_tts.patching.weight_versions import span

if TYPE_CHECKING:
    from collections.abc import Hashable


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_ALIGNED = 512  # bytes; torch's allocator aligns to as many
_KERNELS_ALIGN = 16  # bytes; kernels are chosen by whether addresses are multiples of this


class CallArguments:
    """Arguments of one call.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        device: Device on which all tensors must be.

    Attributes:
        tensors: The tensors, each once.
        key: Hashable signature: equal for two calls that one recording serves.
        obstacle: The reason why no recording can serve it; "" without one.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
        self._args, self._kwargs, self._device = args, kwargs, device
        self.tensors: list[torch.Tensor] = []
        self.obstacle = ""
        self._numbers: dict[int, int] = {}
        self.key: Hashable = (self._signature(args), self._signature(kwargs))
        if not self.tensors:
            self.obstacle = self.obstacle or "it is given no tensor"

    def _signature(self, value: Any) -> Hashable:
        kind = type(value)
        content: Hashable = value
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if kind is dict:
            content = tuple((name, self._signature(item)) for name, item in value.items())
        elif kind in {list, tuple} or (isinstance(value, tuple) and hasattr(value, "_fields")):
            content = tuple(map(self._signature, value))
        elif isinstance(value, float):
            content = value.hex()  # tells 0.0 from -0.0
        elif not isinstance(value, _PLAIN):
            self.obstacle = f"it is given a {kind.__name__}"
            content = None
        return kind, content

    def _of_tensor(self, tensor: torch.Tensor) -> Hashable:
        if id(tensor) in self._numbers:  # a forward may ask if two arguments are the same
            return self._numbers[id(tensor)]
        plain = type(tensor) in {torch.Tensor, torch.nn.Parameter} and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            self.obstacle = f"it is given a {type(tensor).__name__} of another layout"
            return None
        if tensor.device != self._device:
            self.obstacle = f"it is given a tensor on {tensor.device}"
            return None
        number = self._numbers[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        place = tensor.data_ptr() % _KERNELS_ALIGN
        return number, tensor.dtype, tuple(tensor.shape), tensor.stride(), place

    def filled(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other tensors in the places of `tensors`."""

        def put(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return tensors[self._numbers[id(value)]]
            if type(value) is dict:
                return {name: put(item) for name, item in value.items()}
            if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
                items = [put(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            return value

        args, kwargs = put(self._args), put(self._kwargs)
        return args, kwargs

    def shapes(self) -> str:
        """Return the shapes of the tensors, for people."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)


class Buffers:
    """Buffers at fixed addresses, which the recordings of one part share: one for each argument and class of size.

    Args:
        device: Their device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in self._made.values())

    @staticmethod
    def needed(call: CallArguments) -> int:
        """Return the bytes of the buffers of a call."""
        return sum(map(_room, call.tensors))

    def for_call(self, call: CallArguments) -> list[torch.Tensor]:
        """Return tensors in buffers, with the shapes, strides and alignment of a call's."""
        return [self._view(number, tensor) for number, tensor in enumerate(call.tensors)]

    def _view(self, number: int, like: torch.Tensor) -> torch.Tensor:
        size = span(like) * like.element_size()
        room = _room(like)
        start = like.data_ptr() % _KERNELS_ALIGN
        with torch.inference_mode(mode=False):  # normal tensors: later calls may run in another mode
            if (number, room) not in self._made:
                self._made[number, room] = torch.zeros(room, dtype=torch.uint8, device=self._device)
            flat = self._made[number, room][start : start + size].view(like.dtype)
            return flat.as_strided(like.shape, like.stride())

    def clear(self) -> None:
        """Let all buffers go. No recording may use them any more."""
        self._made = {}


def _room(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's buffer: a power of two, with room for its alignment."""
    return max(_ALIGNED, 1 << (span(tensor) * tensor.element_size() + _KERNELS_ALIGN - 1).bit_length())


def fill(buffers: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Copy tensors into buffers of their shapes and strides, with the gaps between their rows."""
    for buffer, tensor in zip(buffers, tensors, strict=True):
        if count := span(tensor):
            buffer.as_strided((count,), (1,)).copy_(tensor.detach().as_strided((count,), (1,)))


def copied(outputs: Any, buffers: list[torch.Tensor], given: list[torch.Tensor]) -> Any:
    """Copy results into tensors that the next replay does not overwrite.

    Strides, and which results share memory, stay as they are. A result that is an argument becomes the caller's.

    Args:
        outputs: Results of a recording.
        buffers: The buffers that it reads.
        given: The caller's tensors that were copied into them.
    """
    known: dict[int, torch.Tensor] = {id(buffer): tensor for buffer, tensor in zip(buffers, given, strict=True)}
    storages = _by_storage(outputs, known)
    for tensors in storages.values():
        first = tensors[0]
        if len(tensors) == 1 and first.storage_offset() == 0 and span(first) == first.numel():
            known[id(first)] = first.clone()
            continue
        start = min(_start(tensor) for tensor in tensors) // _ALIGNED * _ALIGNED
        end = max(_start(tensor) + span(tensor) * tensor.element_size() for tensor in tensors)
        everything = torch.empty(0, dtype=torch.uint8, device=first.device)
        everything = everything.set_(first.untyped_storage(), start, (end - start,), (1,)).clone()
        for tensor in tensors:
            at = _start(tensor) - start
            part = everything[at : at + span(tensor) * tensor.element_size()].view(tensor.dtype)
            known[id(tensor)] = part.as_strided(tensor.shape, tensor.stride())
    return _pytree.tree_map_only(torch.Tensor, lambda tensor: known[id(tensor)], outputs)


def output_bytes(outputs: Any) -> int:
    """Return the bytes of the memory of results."""
    return sum(int(tensors[0].untyped_storage().nbytes()) for tensors in _by_storage(outputs, {}).values())


def _by_storage(outputs: Any, known: dict[int, torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    found: dict[int, list[torch.Tensor]] = {}
    seen = set(known)
    for leaf in _pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in seen:
            seen.add(id(leaf))
            found.setdefault(leaf.untyped_storage()._cdata, []).append(leaf)
    return found


def _start(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()
