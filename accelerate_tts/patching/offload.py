"""Where the loaded weights lie of which tuning made copies: in memory, in a file, or nowhere.

`balanced` and `fast` compute from bf16 or int8 copies. The weights as they were loaded are then read by the guard's
second attempt, by `undo` and by `state_dict` only; in a file, they take no memory until somebody reads them, and the
user's own load function can load them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device.file_mapping import move_to_file
from accelerate_tts.errors import ReloadError
from accelerate_tts.events import NotApplied, emit
from accelerate_tts.patching.class_swap import COPY, HALF, PACKED, make_copies, serves_copies
from accelerate_tts.patching.derived import Derived
from accelerate_tts.patching.lazy_parameters import LetGo, layers_of
from accelerate_tts.patching.weight_versions import lie_in_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import nn

__all__ = ["copied_storages", "let_go_of", "originals_to_file"]

_LEAST = 1 << 16  # bytes: what is smaller is not worth a mapping


def originals_to_file(roots: Iterable[nn.Module], what: str, folder: Path) -> int:
    """Move the weights of layers that compute from copies into a file without a name.

    Args:
        roots: The modules that were tuned, with their changes in force.
        what: Whose they are, for the event that says why they stay in memory.
        folder: Where the file is made.

    Returns:
        Bytes that were moved; 0 with a `NotApplied` event if they could not be.
    """
    storages = copied_storages(roots)
    if not storages:
        return 0
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        moved = move_to_file(storages.items(), folder)
    except OSError as error:
        emit(NotApplied(f"weights of {what} in a file", str(error)))
        return 0
    lie_in_files(storages.items())
    return moved


def let_go_of(
    what: str,
    found: Mapping[str, nn.Module],
    again: Callable[[], dict[str, nn.Module]],
    besides: set[nn.Module],
) -> LetGo | None:
    """Make ready to let the weights go of layers that compute all they are given from copies. Nothing is gone yet.

    They are loaded once, to see that the load function gives the same ones again.

    Args:
        what: A short name of the tuned object, for events.
        found: The outermost modules that were tuned, with their changes in force, by their path from what was loaded.
        again: Loads them again, and gives the outermost modules of that by path.
        besides: Modules whose weights stay: a compiled graph knows what its weights were.

    Returns:
        What lets them go; `None` where there are none, or with a `NotApplied` event if they cannot be loaded again.
    """
    for root in found.values():
        make_copies(root)
    layers = layers_of(found, _computes_from_copies, besides)
    if not layers:
        return None
    let_go = LetGo(what, layers, again)
    try:
        let_go.check()
    except ReloadError as error:
        emit(NotApplied(f"guard_weights='reload' of {what}", f"{error}; they stay in memory"))
        return None
    return let_go


def _computes_from_copies(module: nn.Module) -> bool:
    """Whether a layer has no need of its weights for anything that it is given; for few rows only is not enough."""
    own = vars(module)
    return COPY not in own and any(isinstance(own.get(attribute), Derived) for attribute in (HALF, PACKED))


def copied_storages(roots: Iterable[nn.Module]) -> dict[int, int]:
    """Addresses and bytes of the loaded weights of layers that compute from copies, as far as they can be moved."""
    return {
        storage.data_ptr(): storage.nbytes()
        for root in roots
        for module in root.modules()
        if serves_copies(module)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and (storage := _movable(tensor)) is not None
    }


def _movable(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor, if it is this process's own and large enough."""
    import torch

    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in {
        torch.Tensor, torch.nn.Parameter,
    }:  # fmt: skip
        return None
    storage = tensor.untyped_storage()
    # Shared memory is other processes' too, and pinned memory is a device's.
    pinned = torch.cuda.is_initialized() and tensor.is_pinned()  # type: ignore[no-untyped-call]
    return None if storage.is_shared() or pinned or storage.nbytes() < _LEAST else storage
