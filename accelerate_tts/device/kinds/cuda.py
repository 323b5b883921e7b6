"""CUDA, and ROCm, which has the same name in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate_tts.device import flags
from accelerate_tts.device.detect import DeviceInfo, DeviceSpec, register_device
from accelerate_tts.device.graphs import DeviceGraphs

if TYPE_CHECKING:
    import torch

    from accelerate_tts.device.detect import Wanted
    from accelerate_tts.settings import Settings

_GIB = 1 << 30
_LEAST_SEARCH = 4 * _GIB


def _probe() -> DeviceInfo | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return DeviceInfo("rocm" if _is_rocm() else "cuda", str(properties.name), int(properties.total_memory))


def _is_rocm() -> bool:
    import torch

    return torch.version.hip is not None


def _call_flags(settings: Settings) -> Wanted:
    # TF32 is enabled on CUDA only, since the same flag affects oneDNN's CPU kernels. AMD's cards without it ignore it.
    wanted: Wanted = []
    if settings.tf32:
        wanted += [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_TF32, True)]
    # On ROCm the same flag has MIOpen try every kernel it has, which takes minutes for a new shape (PyTorch 145294 and
    # 179795), and each text has other shapes. Without it MIOpen searches briefly. The flag is left as the user has it.
    if settings.cudnn_benchmark and not _is_rocm():
        wanted.append((flags.CUDNN_BENCHMARK, True))
    return wanted


def _tuning_flags(device: DeviceInfo) -> Wanted:
    """Leave half of the free memory to others while tuning.

    cuDNN's search for the fastest kernels tries those that borrow whatever is free (73 of 80 GB were seen for moments,
    docs/decisions/0009-cuda.md). torch goes on without a kernel whose memory the allocator refuses. MIOpen's search
    asks for what the largest kernel needs, and fails without it; so ROCm has no such limit.
    """
    import torch

    if device.kind == "rocm":
        return []

    known = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in torch 2.6
    if known is None or not torch.backends.cudnn.benchmark or not device.total_memory:
        return []
    free = _free_bytes(device)
    # Unused blocks of the allocator are free and reserved at once, so they count once.
    most = int(torch.cuda.memory_allocated()) + max(free // 2, min(free, _LEAST_SEARCH))
    share = most / device.total_memory
    return [(flags.CUDA_SHARE, share)] if share < known() else []


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
        tuning_flags=_tuning_flags,
        half_dtypes=_half_dtypes,
        graphs=DeviceGraphs("cuda", "CUDAGraph", "1.10", priority=-3, capture_error_mode="thread_local"),
        free_bytes=_free_bytes,
        batch_size=_batch_size,
    )
)
