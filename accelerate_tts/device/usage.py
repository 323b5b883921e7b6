"""Monotonic counters of processor time, in seconds: of this process, all processes, a hypervisor, a quota.

Linux reports all of them (`/proc/stat`, `/proc/self/task/*/schedstat`, `cpu.stat` of the control group). macOS and
Windows report the time of all processes, through psutil. A counter that the system does not report is `None`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate_tts.device.cgroup import groups, read
from accelerate_tts.device.cpu import affinity_cpus

TICK = 0.01
"""Resolution in seconds of the system's processor times, which count in hundredths."""

_BUSY = (0, 1, 2, 5, 6)  # fields of a processor's line: user, nice, system, irq, softirq
_STOLEN = 7


@dataclass(frozen=True)
class Usage:
    """Counters at one moment, in seconds.

    Attributes:
        at: Time of the clock (`time.perf_counter`).
        own: Processor time of all threads of this process.
        busy: Processor time of all processes on the processors that this one may use; `None` if unknown.
        stolen: Time that a hypervisor took from those processors; `None` if unknown.
        waited: Time that runnable threads of this process waited for a processor; `None` if unknown.
        throttled: Time that the control group's quota was exhausted; `None` without a quota, or if unknown.
        processors: Number of processors that `busy` covers.
    """

    at: float
    own: float
    busy: float | None = None
    stolen: float | None = None
    waited: float | None = None
    throttled: float | None = None
    processors: int = 1


def usage(root: Path | str = "/") -> Usage:
    """Read the counters.

    Args:
        root: Folder of `/proc` and `/sys`; another folder in tests.
    """
    root = Path(root)
    times = os.times()
    own = times.user + times.system  # in the same ticks as the system's counters; `process_time` is finer, and ahead
    busy, stolen, processors = _from_stat(root)
    if busy is None:
        busy, processors = _from_psutil(), os.cpu_count() or 1
    return Usage(time.perf_counter(), own, busy, stolen, waited(root), _throttled(root), processors)


def waited(root: Path | str = "/") -> float | None:
    """Return the seconds that threads of this process have waited for a processor, or `None` (except on Linux).

    Threads that have ended are not included.

    Args:
        root: Folder of `/proc`; another folder in tests.
    """
    nanoseconds, told = 0, False
    try:
        threads = list((Path(root) / "proc/self/task").iterdir())
    except OSError:
        return None
    for thread in threads:
        fields = (read(thread / "schedstat") or "").split()
        if len(fields) > 1 and fields[1].isdecimal():
            nanoseconds, told = nanoseconds + int(fields[1]), True
    return nanoseconds / 1e9 if told else None


def _from_stat(root: Path) -> tuple[float | None, float | None, int]:
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    names = {f"cpu{number}" for number in mine}
    rows = [line.split() for line in (read(root / "proc/stat") or "").splitlines()]
    found = [row[1:] for row in rows if row and row[0] in names]
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        busy = sum(int(row[place]) for row in found for place in _BUSY)
        stolen = sum(int(row[_STOLEN]) for row in found)
    except (AttributeError, IndexError, ValueError, OSError):  # the file is missing, or has another format
        return None, None, affinity_cpus()
    return (busy / ticks, stolen / ticks, len(found)) if found else (None, None, affinity_cpus())


def _from_psutil() -> float | None:
    try:
        import psutil

        times = psutil.cpu_times()
    except Exception:
        return None
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))


def _throttled(root: Path) -> float | None:
    """Return the largest throttled time of the process's control groups, in seconds."""
    found: list[float] = []
    for folder, _ in groups("cpu", root):
        for line in (read(folder / "cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name in _THROTTLED and value.isdecimal():
                found.append(int(value) / _THROTTLED[name])
    return max(found, default=None)


_THROTTLED = {"throttled_usec": 1e6, "throttled_time": 1e9}  # units a second, in cgroup v2 and v1
