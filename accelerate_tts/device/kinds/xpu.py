"""XPU, Intel's GPUs, in builds of torch that support them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device.detect import DeviceInfo, DeviceSpec, register_device
from accelerate_tts.device.graphs import DeviceGraphs

if TYPE_CHECKING:
    import torch


def _probe() -> DeviceInfo | None:
    import torch

    xpu = getattr(torch, "xpu", None)
    if xpu is None or not xpu.is_available():
        return None
    properties = xpu.get_device_properties(xpu.current_device())
    return DeviceInfo("xpu", str(properties.name), int(properties.total_memory))


def _half_dtypes() -> tuple[torch.dtype, ...]:
    import torch

    return (torch.bfloat16,)


def _free_bytes(device: DeviceInfo) -> int | None:
    import torch

    # torch.xpu.mem_get_info exists since 2.7; before, the total minus torch's own allocations is the best estimate.
    if hasattr(torch.xpu, "mem_get_info"):
        cached = torch.xpu.memory_reserved() - torch.xpu.memory_allocated()
        return int(torch.xpu.mem_get_info()[0]) + cached
    return None if device.total_memory is None else device.total_memory - torch.xpu.memory_allocated()


register_device(
    DeviceSpec(
        "xpu",
        _probe,
        half_dtypes=_half_dtypes,
        graphs=DeviceGraphs("xpu", "XPUGraph", "2.11"),  # its captures have one mode, that of the thread
        free_bytes=_free_bytes,
    )
)
