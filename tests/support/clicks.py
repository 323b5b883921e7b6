"""A detector of clicks at the joints of a stream, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_NEAR, _AROUND = 3, 480
"""Samples on either side of a joint that a click would be in, and those it is compared with (20 ms at 24 kHz)."""
_TIMES = 2.0
"""A click is a bend this many times as sharp as the sharpest bend around it."""
_LEAST = 1e-4
"""Bends below 80 dB under full scale are inaudible."""


def clicks(wave: Tensor, joints: Iterable[int]) -> list[int]:
    """Return the joints at which a wave clicks.

    A jump bends the wave far more than speech does: its second difference at the joint is compared with the largest one
    in the 20 ms around it.

    Args:
        wave: Samples of shape (samples,), full scale 1.
        joints: Indices of the first sample after each joint.
    """
    bends = wave.double().diff(n=2).abs()
    found: list[int] = []
    for joint in joints:
        centre = joint - 1  # bend i is that of samples i, i + 1 and i + 2
        at = bends[max(0, centre - _NEAR) : centre + _NEAR]
        before, after = bends[max(0, centre - _AROUND) : max(0, centre - _NEAR)], bends[centre + _NEAR :][:_AROUND]
        around = max((float(side.max()) for side in (before, after) if len(side)), default=0.0)
        if len(at) and float(at.max()) > max(_TIMES * around, _LEAST):
            found.append(joint)
    return found
