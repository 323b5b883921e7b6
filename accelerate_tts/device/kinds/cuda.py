"""CUDA, and ROCm, which has the same name in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device import flags
from accelerate_tts.device.detect import DeviceInfo, DeviceSpec, register_device

if TYPE_CHECKING:
    import torch

    from accelerate_tts.device.detect import Wanted
    from accelerate_tts.settings import Settings

_GIB = 1 << 30


def _probe() -> DeviceInfo | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    kind = "rocm" if torch.version.hip is not None else "cuda"
    return DeviceInfo(kind, str(properties.name), int(properties.total_memory))


def _call_flags(settings: Settings) -> Wanted:
    # TF32 is enabled on CUDA only, since the same flag affects oneDNN's CPU kernels.
    wanted: Wanted = []
    if settings.tf32:
        wanted += [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_TF32, True)]
    if settings.cudnn_benchmark:
        wanted.append((flags.CUDNN_BENCHMARK, True))
    return wanted


def _half_dtypes() -> tuple[torch.dtype, ...]:
    import torch

    return (torch.bfloat16,) if torch.cuda.is_bf16_supported(including_emulation=False) else (torch.float16,)


def _free_bytes(device: DeviceInfo) -> int:
    import torch

    del device
    free, _total = torch.cuda.mem_get_info()
    # Cached unused blocks of the allocator count as free, since it reuses them without the driver.
    return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _batch_size(device: DeviceInfo) -> int | None:
    if device.total_memory is None:
        return None
    return 4 if device.total_memory > 16 * _GIB else 2 if device.total_memory > 8 * _GIB else 1


register_device(
    DeviceSpec(
        "cuda",
        _probe,
        # CUDA graphs remove the launch cost of a GPU's kernels. On a CPU the mode has no effect.
        compile_mode="reduce-overhead",
        call_flags=_call_flags,
        half_dtypes=_half_dtypes,
        free_bytes=_free_bytes,
        batch_size=_batch_size,
    )
)
