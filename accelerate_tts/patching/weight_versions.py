"""Whether tensors are still what they were: the one answer to whether something that was made of weights is stale.

A tensor's address and version tell of everything that goes by torch's own ways. What goes past them counts no version:
`weight.data += d` (PEFT merges adapters so), a NumPy array or another process that shares the memory, a write to an
inference tensor. Whoever has copies of weights therefore has a digest of each 1,024 bytes of them too, and each look
reads one such piece of every tensor and compares. A change of a whole tensor is seen by the next look; a change of a
few of its elements when the pieces come round, after as many looks as the tensor has kilobytes.

On other devices, and where there are no kernels, reading is dear: there some places are compared, always the same, and
looks take at most a hundredth of the time (`_Pace`). Weights that lie in a file (offload.py) are read at one place
too, so that they stay there.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from accelerate_tts.kernels.library import kernels, missing

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Weights", "lie_in_files"]

_PIECE = 1024  # bytes, as in weight_digests.cpp
_PLACES = 64  # elements of a tensor that are compared where there are no digests
_MOST_OF_TIME = 0.01
_GOLDEN = 0.6180339887

Holder = dict[str, Any]
"""A module's `_parameters` or `_buffers`."""


class Weights:
    """The tensors of a module, and of what is inside it, as they are now.

    Args:
        module: The module. Names are watched, not tensors: `load_state_dict(assign=True)` puts others there.
        content: Whether copies are made of what is in them. What reads the tensors themselves at each call needs to
            know where they are, and no more.
    """

    def __init__(self, module: nn.Module, *, content: bool = True) -> None:
        found: list[tuple[Any, Any]] = [(inner._parameters, inner._buffers) for inner in module.modules()]
        self._watch([*found[0], *[holder for holder in chain(*found[1:]) if holder]], content=content)

    @classmethod
    def at(cls, holders: Iterable[Holder], *, content: bool = True) -> Weights:
        """The tensors in some dictionaries."""
        made = cls.__new__(cls)
        made._watch(list(holders), content=content)
        return made

    def _watch(self, holders: list[Holder], *, content: bool) -> None:
        self._holders = holders
        tensors = self._tensors()
        # Before anything is made of them: what is written meanwhile is seen by the next look.
        self._addresses, self._versions = _state(tensors)
        self._layouts = list(map(_layout, tensors))
        self._turn = 0
        readable = [t for t, address in zip(tensors, self._addresses, strict=True) if address and _is_dense(t)]
        native = [t for t in readable if content and t.device.type == "cpu"]
        native = native if native and missing() is None else []
        known = set(map(id, native))
        self._digests = _Digests(native) if native else None
        # By number: holding the tensors themselves would keep them from being freed.
        self._places = [
            (number, _Places(t))
            for number, t in enumerate(tensors)
            if content and id(t) not in known and not t.is_quantized and any(t is other for other in readable)
        ]  # fmt: skip

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for holder in self._holders for tensor in holder.values() if tensor is not None]

    def outdated(self) -> bool:
        """Whether a tensor was written, moved or exchanged since."""
        tensors = self._tensors()  # held as long as their memory is read
        addresses, versions = _state(tensors)
        if addresses != self._addresses or versions != self._versions:
            return True
        if tensors:  # `weight.data = weight.data.t()` leaves the address; asking all would cost as much as the rest
            self._turn = (self._turn + 1) % len(tensors)
            if _layout(tensors[self._turn]) != self._layouts[self._turn]:
                return True
        if self._digests is not None and self._digests.differ():
            return True
        return bool(self._places) and _pace.allows(lambda: self._differ(tensors))

    def _differ(self, tensors: list[torch.Tensor]) -> bool:
        return any(places.differ(tensors[number]) for number, places in self._places)


def _state(tensors: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    try:
        return [t.data_ptr() for t in tensors], [t._version for t in tensors]
    except RuntimeError:  # an inference tensor has no version, a sparse one no address
        return list(map(_address, tensors)), [0 if t.is_inference() else t._version for t in tensors]


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride() if _is_dense(tensor) else ()


def _is_dense(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.layout is torch.strided


def _span(tensor: torch.Tensor) -> int:
    """The elements between a tensor's first and its last, with what lies between its rows."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


# --- on a CPU, by the kernels' library --------------------------------------------------------------------------------

_files: list[tuple[int, int]] = []


def lie_in_files(regions: Iterable[tuple[int, int]]) -> None:
    """Take note of memory, by address and bytes, whose pages are read from a file when somebody looks at them."""
    _files.extend(regions)


class _Digests:
    """Digests of the pieces of some tensors, and which piece of each is compared next."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        digests, self._changed = kernels().digests, kernels().changed
        count = len(tensors)
        starts = [t.data_ptr() for t in tensors]
        sizes = [_span(t) * t.element_size() for t in tensors]
        self._kept = [(ctypes.c_uint64 * max(1, -(-size // _PIECE)))() for size in sizes]
        for start, size, room in zip(starts, sizes, self._kept, strict=True):
            digests(start, size, room)
        self._regions = list(zip(starts, sizes, strict=True))
        self._steps = (ctypes.c_int64 * count)(*map(_step, map(len, self._kept)))
        self._moved = 0
        self._tables = (
            (ctypes.c_void_p * count)(*starts), (ctypes.c_int64 * count)(*sizes),
            (ctypes.c_void_p * count)(*(ctypes.addressof(kept) for kept in self._kept)), (ctypes.c_int64 * count)(),
        )  # fmt: skip
        told: tuple[Any, ...] = (*self._tables, self._steps)
        self._asked = (*map(ctypes.addressof, told), count)

    def differ(self) -> bool:
        """Whether a piece is another now. The tensors must be where they were, and held by the caller."""
        if self._moved != len(_files):
            self._moved = len(_files)
            for number, (start, size) in enumerate(self._regions):
                if any(place < start + size and start < place + length for place, length in _files):
                    self._steps[number] = 0
        return bool(self._changed(*self._asked))


def _step(pieces: int) -> int:
    """A step that comes to all pieces, far from each other at first: changes are of neighbours, mostly."""
    step = max(1, round(pieces * _GOLDEN))
    while math.gcd(step, pieces) > 1:
        step += 1
    return step


# --- elsewhere -------------------------------------------------------------------------------------------------------


class _Places:
    """Some elements of a tensor, as bits."""

    def __init__(self, tensor: torch.Tensor) -> None:
        import torch

        span = _span(tensor)
        # Spread evenly, and in no step with rows: a multiple of the golden ratio, without what is before the point.
        places = sorted({int(span * (number * _GOLDEN % 1)) for number in range(_PLACES)}) if span else []
        with torch.inference_mode(mode=False), torch.no_grad():
            self._places = torch.tensor(places, dtype=torch.int64, device=tensor.device)
            self._bits = self._read(tensor)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        flat = tensor.detach().as_strided((_span(tensor),), (1,))
        if flat.is_complex():
            return torch.view_as_real(flat[self._places]).contiguous().view(torch.uint8)
        return flat[self._places].view(torch.uint8)

    def differ(self, tensor: torch.Tensor) -> bool:
        """Whether an element is another now."""
        import torch

        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a recording must not wait; the calls around it look
        with torch.inference_mode(mode=False), torch.no_grad():
            return not torch.equal(self._read(tensor), self._bits)


class _Pace:
    """Keeps what is done within a share of the time that goes by.

    Args:
        share: The share.
        clock: Seconds.
    """

    def __init__(self, share: float = _MOST_OF_TIME, clock: Callable[[], float] = time.perf_counter) -> None:
        self._share, self._clock = share, clock
        self._next = 0.0

    def allows(self, look: Callable[[], bool]) -> bool:
        """What a look finds; `False` where it is too early for one."""
        begun = self._clock()
        if begun < self._next:
            return False
        found = look()
        ended = self._clock()
        self._next = ended + (ended - begun) / self._share
        return found


_pace = _Pace()
