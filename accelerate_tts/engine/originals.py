"""Where the loaded weights lie of which tuning made copies: in memory, or in a file.

`balanced` and `fast` compute from bf16 or int8 copies. The weights as they were loaded are then read by the guard's
second attempt, by `undo` and by `state_dict` only; in a file, they take no memory until somebody reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device.mapped import move_to_file
from accelerate_tts.engine.stages.swap import serves_copies
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch
    from torch import nn

__all__ = ["copied_storages", "originals_to_file"]

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
        return move_to_file(storages.items(), folder)
    except OSError as error:
        emit(NotApplied(f"weights of {what} in a file", str(error)))
        return 0


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
