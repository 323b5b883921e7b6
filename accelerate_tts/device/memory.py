"""Free memory, peak memory of an item, and clean-up. Sizes are in bytes."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from accelerate_tts.device.cgroup import groups, read
from accelerate_tts.device.detect import DeviceInfo, spec_of
from accelerate_tts.errors import described
from accelerate_tts.events import NotApplied, emit

# Share of free memory below which a clean-up is worth its cost (a collection takes 50-200 ms with models loaded).
_PRESSURE = 0.10


def free_bytes(device: DeviceInfo) -> int | None:
    """Return the free bytes of `device`, or `None` if unknown."""
    return spec_of(device).free_bytes(device)


def free_host_bytes() -> int:
    """Return the free bytes of the machine, within the limits of the process's container."""
    import psutil

    headroom = cgroup_headroom()
    available = int(psutil.virtual_memory().available)
    return available if headroom is None else min(available, headroom)


def cgroup_headroom(root: Path | str = "/") -> int | None:
    """Return the bytes left under the tightest memory limit of the control group and its parents, or `None`.

    Args:
        root: Folder of `/proc` and `/sys`; another folder in tests.
    """
    found = _tightest(root)
    return None if found is None else max(0, found[0] - found[1])


def _tightest(root: Path | str = "/") -> tuple[int, int] | None:
    """Return limit and use of the group with the least memory left."""
    limits = (_limit(folder, *_FILES[version]) for folder, version in groups("memory", root))
    return min(filter(None, limits), key=lambda found: found[0] - found[1], default=None)


_FILES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def _limit(folder: Path, limit: str, used: str) -> tuple[int, int] | None:
    most, now = read(folder / limit) or "", read(folder / used) or ""
    # "max" or nothing means no limit, as does a number near 2**63 in v1.
    if not most.isdecimal() or not now.isdecimal() or int(most) >= 2**60:
        return None
    return int(most), int(now) - _reclaimable(folder)


def _reclaimable(folder: Path) -> int:
    # The page cache of read files counts as used, but is reclaimed on demand.
    lines = (read(folder / "memory.stat") or "").splitlines()
    fields = dict(line.split(maxsplit=1) for line in lines if " " in line)
    value = fields.get("total_inactive_file", fields.get("inactive_file", "0"))
    return int(value) if value.strip().isdecimal() else 0


def under_pressure(device: DeviceInfo) -> bool:
    """Check that less than a tenth of the device's (or the machine's) memory is free."""
    import psutil

    if device.total_memory is not None:
        free = free_bytes(device)
        return free is not None and free < _PRESSURE * device.total_memory
    container = _tightest()
    total = int(psutil.virtual_memory().total)
    return free_host_bytes() < _PRESSURE * (total if container is None else min(total, container[0]))


def resident_bytes() -> int:
    """Return the resident set size of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the peak resident set size of this process on Linux, 0 if it is not reported.

    Unlike `ru_maxrss` it does not include the parent's memory from before the exec.
    """
    status = Path("/proc/self/status").read_text("utf-8", "replace")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def cleanup(device: DeviceInfo) -> None:
    """Collect garbage, empty the allocator's cache of `device`, and return freed heap pages to the system.

    Never raises: a failure becomes an event. Memory in use, also by running calls, is not touched.
    """
    import torch

    steps: list[tuple[str, Callable[[], object]]] = [("garbage collection", gc.collect)]
    if device.type != "cpu":
        steps.append((f"{device.type.upper()} cache", getattr(torch, device.type).empty_cache))
    steps.append(("malloc_trim", trim_heap))
    for name, step in steps:
        try:
            step()
        except Exception as error:  # a clean-up must never fail the user's call
            emit(NotApplied(f"clean-up step {name!r}", described(error)))


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # musl and other C libraries do not have it
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int

    def call(keep: int) -> int:
        return int(trim(keep))

    return call


def trim_heap() -> None:
    """Return freed heap pages to the system, under glibc.

    Many small freed tensors stay in its arenas, and in the resident set, until this call.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def peak_of(device: DeviceInfo, work: Callable[[], object]) -> int | None:
    """Run `work` and return the bytes by which it raised the peak of the memory in use.

    On CUDA this is the allocator's peak. On Linux it is the peak resident set, which is reset before the run. Reuse of
    memory that the process has freed to its own heap is not counted, so the first run of a shape is the most accurate.

    Returns:
        The bytes, at least 0, or `None` if the system has no peak counter that can be reset.
    """
    import torch

    if device.type in {"cuda", "xpu"}:
        backend = torch.cuda if device.type == "cuda" else torch.xpu
        backend.synchronize()
        backend.reset_peak_memory_stats()
        before = backend.memory_allocated()
        work()
        backend.synchronize()
        return max(0, int(backend.max_memory_allocated()) - int(before))
    trim_heap()
    if device.type != "cpu" or not _reset_peak():
        work()
        return None
    before = resident_bytes()
    work()
    return max(0, peak_resident_bytes() - before)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
