"""Memory that is lent to one user at a time, and used again once nobody has a tensor over it any more.

A user may keep more than the tensors that it was given: views of them, a copy of the list that they were in, a cache
of its own made of those. All of these have one storage. So each loan has a storage of its own over the same memory
(DLPack), and the loan ends when that storage is gone.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Sequence


class LentMemory:
    """Memory of some tensors. One loan at a time.

    Args:
        tensors: The tensors, which may be views. Each has a last dimension without gaps.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._given: list[weakref.ref[torch.Tensor]] = []
        self._storages: list[StorageWeakRef] = []

    def lend(self) -> list[torch.Tensor]:
        """Return new tensors over the memory, one for each, of the same shape, strides and dtype.

        Raises:
            RuntimeError: The last loan has not ended.
        """
        if self.is_lent():
            raise RuntimeError("memory that is in use was to be lent to another user")
        with torch.inference_mode(mode=False):  # the loan may be written to in another mode
            given = [_again(tensor) for tensor in self._tensors]
        self._given = [weakref.ref(tensor) for tensor in given]
        self._storages = [_reference(tensor) for tensor in given]
        return given

    def is_lent(self) -> bool:
        """Check that a tensor over the memory is alive, besides those that were passed in. Nothing revives a loan."""
        return not all(storage.expired() for storage in self._storages)  # type: ignore[no-untyped-call]

    def is_all_of(self, tensors: Sequence[object]) -> bool:
        """Check that these are the tensors of the present loan, in their order."""
        return len(tensors) == len(self._given) and all(
            tensor is not None and reference() is tensor for reference, tensor in zip(self._given, tensors, strict=True)
        )

    def has(self, tensor: torch.Tensor) -> bool:
        """Check that a tensor is one of the present loan, or a view of one."""
        return _reference(tensor) in self._storages


def _reference(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no types for it


def _again(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with a storage of its own over the same memory."""
    # As bytes: torch 2.6 has no DLPack for 8-bit floats. It has other strides for dimensions of size 1, too.
    data = tensor.detach().view(torch.uint8)
    again = from_dlpack(to_dlpack(data))
    return again.as_strided(data.shape, data.stride()).view(tensor.dtype)
