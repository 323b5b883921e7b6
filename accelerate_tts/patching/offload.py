"""Offloading of original weights that tuning duplicated: to a file, or freed and reloaded when needed.

`balanced` and `fast` compute from bf16 or int8 copies. Only the guard's second attempt, `undo` and `state_dict` then
read the original weights. In a file, they take no memory until they are read. If they are freed, the user's load
function loads them again.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from accelerate_tts.device.detect import current_devices
from accelerate_tts.device.file_mapping import move_to_file, move_to_memory
from accelerate_tts.errors import ReloadError
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.patching.class_swap import COPY, HALF, PACKED, make_copies, serves_copies
from accelerate_tts.patching.derived import Derived
from accelerate_tts.patching.lazy_parameters import WeightOffloader, layers_of
from accelerate_tts.patching.weight_versions import lie_in_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

_LEAST = 1 << 16  # bytes; smaller storages are not worth a mapping


def originals_to_file(roots: Sequence[nn.Module], what: str, folder: Path) -> int:
    """Move the weights of layers that compute from copies into an unlinked file.

    Args:
        roots: The tuned modules, with their changes on.
        what: The object's name in events.
        folder: Folder of the file.

    Returns:
        Bytes moved; 0 if there are none, or with a `NotApplied` event if the file could not be written.
    """
    storages = copied_storages(roots)
    if not storages:
        return 0
    # Before anything is moved: after an interruption, each place must be as long in its file as it has tensors.
    places = {address: _InFile(storage) for address, storage in storages.items()}
    for tensor in (tensor for root in roots for tensor in (*root.parameters(), *root.buffers())):
        if (storage := movable(tensor)) is not None and storage.data_ptr() in places:
            weakref.finalize(tensor, _let_go, places[storage.data_ptr()]).atexit = False
    for place in places.values():
        place.is_mapped = True
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        moved = move_to_file([(place, storage.nbytes()) for place, storage in storages.items()], folder)
    except OSError as error:
        for place in places.values():
            place.is_mapped = False
        emit(NotApplied(f"weights of {what} in a file", str(error)))
        return 0
    lie_in_files(storages.values())
    return moved


class _InFile:
    """A storage whose pages are mapped from a file, until the last tensor of it on a module is gone.

    Its memory is then mapped as it was before, and freed.

    Attributes:
        is_mapped: True if its pages may be mapped from a file.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self.is_mapped = False

    def __del__(self) -> None:
        if sys.is_finalizing() or not self.is_mapped:
            return
        try:
            region = self._storage.data_ptr(), self._storage.nbytes()
            move_to_memory(region, content=_uses(self._storage) != _uses_at_the_end())
        except OSError:
            _stuck.append(self._storage)  # never freed, since its pages would come back from the file


_stuck: list[torch.UntypedStorage] = []


def _let_go(_place: _InFile) -> None:
    """Drop the last reference that a finalizer holds."""


def _uses(storage: torch.UntypedStorage) -> int:
    core: Any = torch._C
    return int(core._storage_Use_Count(storage._cdata)) if hasattr(core, "_storage_Use_Count") else -1


@cache
def _uses_at_the_end() -> int:
    """Return the number of uses of a held storage whose only tensor is being freed."""
    found: list[int] = []
    tensor = torch.nn.Parameter(torch.zeros(1))
    storage = tensor.untyped_storage()
    weakref.finalize(tensor, lambda: found.append(_uses(storage)))
    del tensor
    return found[0] if found and found[0] >= 0 else 0


def offloader_of(
    what: str, found: Mapping[str, nn.Module], again: Callable[[], dict[str, nn.Module]], besides: set[nn.Module]
) -> WeightOffloader | None:
    """Prepare to free the weights of layers that compute everything from copies. Nothing is freed yet.

    The weights are loaded once to check that the load function returns the same ones.

    Args:
        what: A short name of the tuned object, for events.
        found: The outermost tuned modules, with their changes on, by their path in the loaded object.
        again: Loads the object again and returns its outermost modules by path.
        besides: Modules that keep their weights, since a compiled graph refers to them.

    Returns:
        The object that frees and reloads them; `None` if there are no such layers, or with a `NotApplied` event if
        they cannot be reloaded.
    """
    for root in found.values():
        make_copies(root)
    layers = layers_of(found, _computes_from_copies, besides)
    if not layers:
        return None
    offloader = WeightOffloader(what, layers, again)
    try:
        offloader.check()
    except ReloadError as error:
        emit(NotApplied(f"guard_weights='reload' of {what}", f"{error}; they stay in memory"))
        return None
    return offloader


def _computes_from_copies(module: nn.Module) -> bool:
    """Check that a layer computes all inputs from copies, not only those with few rows."""
    own = vars(module)
    return COPY not in own and any(isinstance(own.get(attribute), Derived) for attribute in (HALF, PACKED))


def copied_storages(roots: Iterable[nn.Module]) -> dict[int, torch.UntypedStorage]:
    """Return the movable storages of the original weights of layers that compute from copies, by their addresses."""
    return {
        storage.data_ptr(): storage
        for root in roots
        for module in root.modules()
        if serves_copies(module)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and (storage := movable(tensor)) is not None
    }


def movable(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return a tensor's storage if it is private to this process and large enough, else `None`."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in {
        torch.Tensor, torch.nn.Parameter,
    }:  # fmt: skip
        return None
    storage = tensor.untyped_storage()
    # Shared memory belongs to other processes, too, and pinned memory to a device.
    pinned = bool(current_devices()) and tensor.is_pinned()
    return None if storage.is_shared() or pinned or storage.nbytes() < _LEAST else storage
