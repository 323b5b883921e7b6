"""Sizes of a cache's buffers: how many positions they hold, and by how many they grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LARGEST = 16_384
"""Maximum positions of a buffer. Longer sequences use upstream's own code."""

_BUCKET = 128
_MOST_ROOM = 4 << 20
"""Maximum spare bytes of a buffer: 500 positions of T3, whose cache is 60 such buffers."""


def capacity_for(needed: int, stored: torch.Tensor) -> int:
    """Return the capacity of a buffer for `needed` positions: half as many again, at most `_MOST_ROOM` spare bytes."""
    of_a_position = stored.numel() // stored.shape[-2] * stored.element_size()
    room = min(max(1, needed // 2), max(1, _MOST_ROOM // of_a_position))
    return min(LARGEST, -(-(needed + room) // _BUCKET) * _BUCKET)
