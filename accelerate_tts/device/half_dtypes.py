"""Half-precision dtypes that a device multiplies in at full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device.detect import spec_of

if TYPE_CHECKING:
    import torch


def half_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """Return the half-precision dtypes that a device computes in, best first; none if they would be emulated."""
    return spec_of(device_type).half_dtypes()
