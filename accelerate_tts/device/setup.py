"""Set-up of each kind of device, as a list of flags to hold."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from accelerate_tts.device import cpu, flags
from accelerate_tts.device.detect import spec_of
from accelerate_tts.events import NotApplied, emit

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
    """Return torch.compile's mode for `device`; `None` if compiling is off, not worth trying (MPS), or not safe.

    A mode in the settings is used where it is not safe, too.
    """
    mode = spec_of(device).compile_mode
    if mode is None or not settings.compile or settings.compile_mode is not None:
        return settings.compile_mode if mode is not None and settings.compile else None
    obstacle = unsafe_compiler()
    if obstacle is not None:
        emit(NotApplied("torch.compile", obstacle))
        return None
    return mode


def unsafe_compiler(python: tuple[int, int] = sys.version_info[:2], release: str | None = None) -> str | None:
    """Return the reason why torch.compile may end the process here, else `None`.

    On Python 3.10, checks of dynamo's guards in torch 2.6 crash once many graphs were made and freed in a process: a
    name that the interpreter's cache of methods still holds has been freed.

    Args:
        python: Version of Python.
        release: Version of torch; this one's if not given.
    """
    if release is None:
        import torch

        release = torch.__version__
    numbers = tuple(int(part) for part in release.split(".")[:2])
    if python < (3, 11) and numbers < (2, 7):
        return f"torch {release} may crash on Python 3.10 when it checks graphs; use Python 3.11, or torch 2.7"
    return None


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
