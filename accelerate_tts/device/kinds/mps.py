"""MPS, Apple's GPUs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from accelerate_tts.device import flags
from accelerate_tts.device.detect import DeviceInfo, DeviceSpec, register_device
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    import torch

    from accelerate_tts.device.detect import Wanted
    from accelerate_tts.settings import Settings

_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
_RATIO = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"


def _probe() -> DeviceInfo | None:
    import torch

    return DeviceInfo("mps", "Apple GPU (MPS)") if torch.backends.mps.is_available() else None


def _setup_flags(settings: Settings) -> Wanted:
    wanted: Wanted = []
    if flags.original(flags.environment(_FALLBACK)) is None:
        # torch reads this variable at its import. Importing accelerate_tts before torch sets it.
        if "torch" in sys.modules:
            emit(
                NotApplied(
                    _FALLBACK,
                    "torch was imported before accelerate_tts and has read it already; import accelerate_tts"
                    f" first, or start Python with {_FALLBACK}=1",
                )
            )
        wanted.append((flags.environment(_FALLBACK), "1"))
    if settings.mps_high_watermark_ratio is not None and flags.original(flags.environment(_RATIO)) is None:
        wanted.append((flags.environment(_RATIO), str(settings.mps_high_watermark_ratio)))
    return wanted


def _half_dtypes() -> tuple[torch.dtype, ...]:
    import torch

    return (torch.float16,)  # bf16 needs macOS 14, and the first of the cards emulate it


def _free_bytes(device: DeviceInfo) -> int:
    import torch

    del device
    return max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory()))


register_device(
    DeviceSpec(
        "mps",
        _probe,
        # inductor's code for Metal is a prototype up to torch 2.14, at least; `compile_model` promises to skip MPS.
        compile_mode=None,
        setup_flags=_setup_flags,
        half_dtypes=_half_dtypes,
        free_bytes=_free_bytes,
        batch_size=lambda _: 2,
    )
)
