"""Set-up of each kind of device, as a list of flags to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_tts.device import cpu, flags
from accelerate_tts.device.detect import spec_of

if TYPE_CHECKING:
    from accelerate_tts.device.detect import DeviceInfo
    from accelerate_tts.device.flags import Flag
    from accelerate_tts.settings import Settings


def call_flags(device: DeviceInfo, settings: Settings) -> list[tuple[Flag, Any]]:
    """Return the flags that make calls on `device` faster, which `fast_inference()` holds."""
    return spec_of(device).call_flags(settings)


def setup_flags(device: DeviceInfo, settings: Settings) -> list[tuple[Flag, Any]]:
    """Return all flags that `PerformanceOptimizer.initialize()` holds for `device`: `call_flags`, threads, environment.

    Variables that the user has set are omitted, and so are their settings.
    """
    return [*call_flags(device, settings), *spec_of(device).setup_flags(settings), *_threads(settings)]


def tuning_flags(device: DeviceInfo) -> list[tuple[Flag, Any]]:
    """Return the flags that are held while an object on `device` is tuned."""
    return spec_of(device).tuning_flags(device)


def compile_mode(device: DeviceInfo, settings: Settings) -> str | None:
    """Return torch.compile's mode for `device`, or `None` if compiling is off or not worth trying (MPS)."""
    mode = spec_of(device).compile_mode
    return None if mode is None or not settings.compile else settings.compile_mode or mode


def _threads(settings: Settings) -> list[tuple[Flag, Any]]:
    import torch

    threads = settings.threads
    if threads is None:
        # Never more than torch's default, which already excludes hyper-threads, unlike a quota.
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
