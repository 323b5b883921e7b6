"""The CPU, which is always available."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from accelerate_tts.device.detect import DeviceInfo, DeviceSpec, register_device
from accelerate_tts.device.memory import free_host_bytes

if TYPE_CHECKING:
    import torch


def _probe() -> DeviceInfo:
    return DeviceInfo("cpu", _model() or platform.processor() or platform.machine() or "CPU")


def _model() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - no Path for one line
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module's name is used
    return None


def _half_dtypes() -> tuple[torch.dtype, ...]:
    import torch

    # oneDNN supports bf16 from AVX-512 on (natively with avx512_bf16 or AMX), and on ARM with its bf16 extension.
    return (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()


register_device(
    DeviceSpec(
        "cpu",
        _probe,
        half_dtypes=_half_dtypes,
        free_bytes=lambda _: free_host_bytes(),
        batch_size=lambda _: 1,
    )
)
