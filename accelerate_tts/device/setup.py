"""What each kind of device is given when it is made ready, as a list of flags to hold."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from accelerate_tts.device import cpu, flags
from accelerate_tts.events import NotApplied, emit

if TYPE_CHECKING:
    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.device.flags import Flag
    from accelerate_tts.settings import Settings

__all__ = ["call_flags", "compile_mode", "setup_flags"]

_MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
_MPS_RATIO = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"


def call_flags(device: DeviceInfo, settings: Settings) -> list[tuple[Flag, Any]]:
    """The switches that make calls on `device` faster: those that `fast_inference()` holds.

    TF32 is never switched on away from CUDA: the same switch reaches oneDNN's CPU kernels.
    """
    if device.kind not in {"cuda", "rocm"}:
        return []
    wanted: list[tuple[Flag, Any]] = []
    if settings.tf32:
        wanted += [(flags.MATMUL_PRECISION, "high"), (flags.CUDNN_TF32, True)]
    if settings.cudnn_benchmark:
        wanted.append((flags.CUDNN_BENCHMARK, True))
    return wanted


def setup_flags(device: DeviceInfo, settings: Settings) -> list[tuple[Flag, Any]]:
    """Everything that `PerformanceOptimizer.initialize()` holds for `device`: `call_flags`, threads, environment.

    A variable that the user has set is left out, and so is what it stands for.
    """
    wanted = call_flags(device, settings)
    if device.kind == "mps":
        wanted += _mps_environment(settings)
    wanted += _threads(settings)
    return wanted


def compile_mode(device: DeviceInfo, settings: Settings) -> str | None:
    """torch.compile's mode for `device`, or `None` where compiling is switched off or not worth trying (MPS)."""
    if not settings.compile or device.kind == "mps":
        return None
    if settings.compile_mode is not None:
        return settings.compile_mode
    # CUDA graphs take away the launch cost of a GPU's kernels; a CPU has none, the mode does nothing there.
    return "reduce-overhead" if device.kind in {"cuda", "rocm"} else "default"


def _threads(settings: Settings) -> list[tuple[Flag, Any]]:
    import torch

    threads = settings.threads
    if threads is None:
        # Only ever fewer than torch took: its default already leaves out hyper-threads, which a quota does not know.
        threads = min(cpu.recommended_threads(settings.workers), flags.original(flags.TORCH_THREADS))
    wanted: list[tuple[Flag, Any]] = [
        (flags.environment(name), value)
        for name, value in cpu.thread_environment(threads).items()
        if flags.original(flags.environment(name)) is None
    ]
    asked_for = settings.threads is not None
    free = flags.original(flags.environment("OMP_NUM_THREADS")) is None
    if (asked_for or free) and (threads != torch.get_num_threads() or flags.is_held(flags.TORCH_THREADS)):
        wanted.append((flags.TORCH_THREADS, threads))
    return wanted


def _mps_environment(settings: Settings) -> list[tuple[Flag, Any]]:
    wanted: list[tuple[Flag, Any]] = []
    if flags.original(flags.environment(_MPS_FALLBACK)) is None:
        # torch is imported by now, and it reads this one at its import. `import accelerate_tts` before torch sets it.
        if "torch" in sys.modules:
            emit(
                NotApplied(
                    _MPS_FALLBACK,
                    "torch was imported before accelerate_tts and has read it already; import accelerate_tts"
                    f" first, or start Python with {_MPS_FALLBACK}=1",
                )
            )
        wanted.append((flags.environment(_MPS_FALLBACK), "1"))
    if settings.mps_high_watermark_ratio is not None and flags.original(flags.environment(_MPS_RATIO)) is None:
        wanted.append((flags.environment(_MPS_RATIO), str(settings.mps_high_watermark_ratio)))
    return wanted
