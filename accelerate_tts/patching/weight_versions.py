"""Versions of weights: the single check for whether a value derived from weights is stale.

A tensor's address and version show all writes through torch's own operations. Other writes count no version:
`weight.data += d` (as PEFT merges adapters), a NumPy array or another process that shares the memory, or a write to an
inference tensor. Copies of weights therefore come with a digest of each 1,024 bytes. Each check reads one such piece of
every tensor and compares it. A change of a whole tensor is seen by the next check. A change of a few elements is seen
when their piece is next, after at most as many checks as the tensor has kilobytes.

Memory that was freed may be another tensor's since, at the same address, with the same version and few other elements.
So each freed storage counts as a change.

On other devices, and without kernels, reading is expensive. There a fixed set of elements is compared, and checks take
at most a hundredth of the time (`Pace`). Of weights in a file (offload.py) only one piece is read, so that the rest
stays out of memory.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import ParametrizationList

from accelerate_tts.device.graphs import is_capturing
from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.tracing import is_watched
from accelerate_tts.kernels.library import kernels, missing

if TYPE_CHECKING:
    from torch import nn

_PIECE = 1024  # bytes, as in weight_digests.cpp
_PLACES = 64  # elements of a tensor that are compared without digests
_MOST_OF_TIME = 0.01
_GOLDEN = 0.6180339887

Holder = dict[str, Any]
"""A module's `_parameters` or `_buffers`, or the dictionary of its attributes."""


class WeightWatch:
    """The present state of all tensors of a module and its submodules, and of the submodules' order.

    Args:
        module: The module. Names are watched rather than tensors, since `load_state_dict(assign=True)` replaces them.
        content: Watch the content, for callers that keep copies of it. Callers that read the tensors themselves at
            each call only need their addresses and versions.
    """

    def __init__(self, module: nn.Module, *, content: bool = True) -> None:
        modules = list(module.modules())
        holders: list[Any] = []
        for inner in modules:
            # The module itself, and one of a user's own class, may be given a tensor where it has none.
            own = inner is module or not _is_torchs(inner)
            holders += [holder for holder in (inner._parameters, inner._buffers) if holder or own]
        self._watch([*holders, *_loose(modules)], content=content)
        # A module without tensors, too, may be put in: another step of a parametrization.
        self._children += [(inner._modules, list(inner._modules.values())) for inner in modules if inner._modules]

    @classmethod
    def at(cls, holders: Iterable[Holder]) -> WeightWatch:
        """Watch the tensors in some dictionaries, and their content."""
        made = cls.__new__(cls)
        made._watch(list(holders), content=True)
        return made

    @classmethod
    def joined(cls, each: Sequence[WeightWatch]) -> WeightWatch:
        """Return one watch for what several watch, in the state in which they found it. A check of it costs less."""
        made = cls.__new__(cls)
        made._turn = 0
        for name in ("_holders", "_children", "_objects", "_addresses", "_versions", "_rows", "_layouts", "_digests",
                     "_storages", "_freed"):  # fmt: skip
            setattr(made, name, [item for one in each for item in getattr(one, name)])
        starts = accumulate((len(one._addresses) for one in each[:-1]), initial=0)
        made._places = [
            (start + number, places)
            for start, one in zip(starts, each, strict=True)
            for number, places in one._places
        ]  # fmt: skip
        return made

    def _watch(self, holders: Sequence[Holder | _Loose], *, content: bool) -> None:
        self._holders = holders
        self._children: list[tuple[Any, list[Any]]] = []
        tensors = self._tensors()
        # Before anything is derived from them, so that a concurrent write is seen by the next check.
        self._objects = list(map(id, tensors))
        self._addresses, self._versions = _state(tensors)
        self._rows = _in_rows(tensors)
        self._layouts = list(map(_layout, tensors))
        self._turn = 0
        readable = [t for t, address in zip(tensors, self._addresses, strict=True) if address and _is_dense(t)]
        native = [t for t in readable if content and t.device.type == "cpu"]
        native = native if native and missing() is None else []
        # Not weak references to the tensors, which `torch.utils.swap_tensors` refuses to swap then.
        freed: list[Any] = []
        self._freed = [freed]
        self._storages = [weakref.ref(t.untyped_storage(), freed.append) for t in readable if content]
        known = set(map(id, native))
        self._digests = [_Digests(native)] if native else []
        # By index: holding the tensors would keep them alive.
        self._places = [
            (number, _Places(t))
            for number, t in enumerate(tensors)
            if content and id(t) not in known and not t.is_quantized and any(t is other for other in readable)
        ]  # fmt: skip

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for holder in self._holders for tensor in holder.values() if tensor is not None]

    def moved(self) -> bool:
        """Check whether a tensor has been moved or replaced, or a module replaced. Writes in place do not count."""
        if [1 for holder, before in self._children if list(holder.values()) != before]:
            return True
        tensors = self._tensors()
        return self._are_others(tensors) or _state(tensors)[0] != self._addresses or self._is_turned(tensors)

    def outdated(self) -> bool:
        """Check whether a tensor has been written, moved or replaced, or a module replaced."""
        if [1 for holder, before in self._children if list(holder.values()) != before]:
            return True
        tensors = self._tensors()  # keeps them alive while their memory is read
        if self._are_others(tensors):
            return True
        addresses, versions = _state(tensors)
        if addresses != self._addresses or versions != self._versions or any(self._freed):
            return True
        return self._is_turned(tensors) or self._is_rewritten(tensors)

    def rewritten(self) -> bool:
        """Check the content alone, for callers that have compared storages, addresses and versions themselves."""
        return self._is_rewritten(self._tensors())

    def _is_rewritten(self, tensors: list[torch.Tensor]) -> bool:
        if [1 for digests in self._digests if digests.differ()]:
            return True
        return bool(self._places) and _pace.allows(lambda: any(one.differ(tensors[at]) for at, one in self._places))

    def _are_others(self, tensors: list[torch.Tensor]) -> bool:
        """Check for other tensors in the same memory: `layer.weight = nn.Parameter(layer.weight.t())`."""
        return list(map(id, tensors)) != self._objects

    def _is_turned(self, tensors: list[torch.Tensor]) -> bool:
        """Check layouts: `weight.data = weight.data.t()` keeps the address.

        Whether a tensor is contiguous is checked of all, its shape and strides of one, another one at each check: all
        at once would be slow.
        """
        if not tensors:
            return False
        if _in_rows(tensors) != self._rows:
            return True
        self._turn = (self._turn + 1) % len(tensors)
        return _layout(tensors[self._turn]) != self._layouts[self._turn]


class _Loose:
    """Tensors that are plain attributes of a module, in the place of its dictionary of parameters."""

    __slots__ = ("_names", "_own")

    def __init__(self, own: Holder, names: list[str]) -> None:
        self._own, self._names = own, names

    def values(self) -> list[torch.Tensor | None]:
        found = (self._own.get(name) for name in self._names)
        return [value if isinstance(value, torch.Tensor) else None for value in found]


def _loose(modules: list[nn.Module]) -> list[_Loose]:
    """Return the weights that are plain attributes: a user's own code, or a hook of theirs, sets them.

    All tensors of torch's own layers and of parametrizations count. Other modules keep state of their calls, too, so
    of theirs only what is named as a weight does.
    """
    steps = {inner for each in modules if isinstance(each, ParametrizationList) for inner in each.modules()}
    found = []
    for inner in modules:
        own = vars(inner)
        names = [name for name, value in own.items() if isinstance(value, torch.Tensor)]
        if names and not _is_torchs(inner) and inner not in steps:
            names = [name for name in names if name in {"weight", "bias"}]
        if names and (names := [name for name in names if name not in _computed(inner)]):
            found.append(_Loose(own, names))
    return found


def _is_torchs(module: nn.Module) -> bool:
    cls = plain_class(module)
    if cls.__module__ == ParametrizationList.__module__ and issubclass(cls.__base__ or cls, torch.nn.Module):
        cls = cls.__base__ or cls  # the class from before it was parametrized
    return cls.__module__.startswith("torch.")


def _computed(module: nn.Module) -> set[str | None]:
    """Return the attributes that torch's own hooks compute before each call, from tensors that are watched."""
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    torchs = [
        hook for hook in hooks if any(cls.__module__.startswith("torch.nn.utils.") for cls in hook.__class__.__mro__)
    ]
    return {getattr(hook, name, None) for hook in torchs for name in ("name", "_tensor_name")}


def _state(tensors: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    try:
        return [t.data_ptr() for t in tensors], [t._version for t in tensors]
    except RuntimeError:  # an inference tensor has no version, a sparse one no address
        return list(map(_address, tensors)), [0 if t.is_inference() else t._version for t in tensors]


def _in_rows(tensors: list[torch.Tensor]) -> list[bool]:
    try:
        return [t.is_contiguous() for t in tensors]
    except RuntimeError:  # a sparse tensor cannot say
        return [_is_dense(t) and t.is_contiguous() for t in tensors]


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride() if _is_dense(tensor) else ()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def span(tensor: torch.Tensor) -> int:
    """Return the number of elements from a tensor's first to its last, gaps between rows included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


# --- on a CPU, by the kernels' library --------------------------------------------------------------------------------


class _Files:
    """Memory whose pages are read from a file on access. `state` changes with each registration."""

    def __init__(self) -> None:
        self.state = 0
        self._regions: list[tuple[int, int, StorageWeakRef]] = []

    def register(self, storages: Iterable[torch.UntypedStorage]) -> None:
        self._regions = [region for region in self._regions if not _is_gone(region[2])]
        for storage in storages:
            self._regions.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))  # type: ignore[no-untyped-call]
        self.state += 1

    def hold(self, start: int, size: int) -> bool:
        """Check for a region of a storage that is alive: later its address may be another tensor's."""
        return any(
            place < start + size and start < place + length and not _is_gone(storage)
            for place, length, storage in self._regions
        )


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]  # torch has no types for it


_files = _Files()


def lie_in_files(storages: Iterable[torch.UntypedStorage]) -> None:
    """Register memory whose pages are read from a file on access, until it is freed."""
    _files.register(storages)


class _Digests:
    """Digests of the pieces of some tensors, and the index of each tensor's next piece."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        digests, self._changed = kernels().digests, kernels().changed
        count = len(tensors)
        starts = [t.data_ptr() for t in tensors]
        sizes = [span(t) * t.element_size() for t in tensors]
        self._kept = [(ctypes.c_uint64 * max(1, -(-size // _PIECE)))() for size in sizes]
        for start, size, room in zip(starts, sizes, self._kept, strict=True):
            digests(start, size, room)
        self._regions = list(zip(starts, sizes, strict=True))
        self._steps = (ctypes.c_int64 * count)(*map(_step, map(len, self._kept)))
        self._seen_files = 0
        self._tables = (
            (ctypes.c_void_p * count)(*starts), (ctypes.c_int64 * count)(*sizes),
            (ctypes.c_void_p * count)(*(ctypes.addressof(kept) for kept in self._kept)), (ctypes.c_int64 * count)(),
        )  # fmt: skip
        told: tuple[Any, ...] = (*self._tables, self._steps)
        self._asked = (*map(ctypes.addressof, told), count)

    def differ(self) -> bool:
        """Check whether a piece has changed. The tensors must be at the same addresses, and held by the caller."""
        if self._seen_files != _files.state:
            self._seen_files = _files.state
            for number, region in enumerate(self._regions):
                if _files.hold(*region):
                    self._steps[number] = 0
        return bool(self._changed(*self._asked))


def _step(pieces: int) -> int:
    """Return a step that visits all pieces and spreads the first ones, since changes are mostly of neighbours."""
    step = max(1, round(pieces * _GOLDEN))
    while math.gcd(step, pieces) > 1:
        step += 1
    return step


# --- elsewhere -------------------------------------------------------------------------------------------------------


class _Places:
    """The bits of some elements of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        count = span(tensor)
        # Spread evenly and not aligned with rows: fractional parts of multiples of the golden ratio.
        places = sorted({int(count * (number * _GOLDEN % 1)) for number in range(_PLACES)}) if count else []
        with torch.inference_mode(mode=False), torch.no_grad():
            self._places = torch.tensor(places, dtype=torch.int64, device=tensor.device)
            self._bits = self._read(tensor)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().as_strided((span(tensor),), (1,))
        if flat.is_complex():
            return torch.view_as_real(flat[self._places]).contiguous().view(torch.uint8)
        return flat[self._places].view(torch.uint8)

    def differ(self, tensor: torch.Tensor) -> bool:
        """Check whether an element has changed."""
        if is_watched() or is_capturing(tensor.device):
            return False  # neither a trace nor a capture may ask the device; the calls around it check
        with torch.inference_mode(mode=False), torch.no_grad():
            return not torch.equal(self._read(tensor), self._bits)


class Pace:
    """Limits checks to a share of the elapsed time.

    Args:
        share: The share.
        clock: Returns seconds.
    """

    def __init__(self, share: float = _MOST_OF_TIME, clock: Callable[[], float] = time.perf_counter) -> None:
        self._share, self._clock = share, clock
        self._next = 0.0

    def allows(self, look: Callable[[], bool]) -> bool:
        """Run a check and return its result; return `False` without it if it is too early."""
        begun = self._clock()
        if begun < self._next:
            return False
        found = look()
        ended = self._clock()
        self._next = ended + (ended - begun) / self._share
        return found


_pace = Pace()
