"""Who used the processors: this process, others, a hypervisor, a quota; as counters that only grow, in seconds.

Linux tells all of it (`/proc/stat`, `/proc/self/task/*/schedstat`, `cpu.stat` of the control group); macOS and Windows
tell the time of all processes, by psutil. What a system does not tell is `None`, never a guess.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate_tts.device.cgroup import groups, read
from accelerate_tts.device.cpu import affinity_cpus

__all__ = ["TICK", "Usage", "usage", "waited"]

TICK = 0.01
"""Seconds that a system's own account of a processor's time may be off by: it counts in hundredths."""

_BUSY = (0, 1, 2, 5, 6)  # of a processor's line: user, nice, system, irq, softirq
_STOLEN = 7


@dataclass(frozen=True)
class Usage:
    """Counters at one moment, in seconds.

    Attributes:
        at: The clock (`time.perf_counter`).
        own: Processor time of this process, of all its threads.
        busy: Processor time of all processes, on the processors that this one may use; `None` where nobody tells.
        stolen: Time in which a hypervisor ran others on those processors; `None` where nobody tells.
        waited: Time in which threads of this process could have run, and had no processor; `None` where nobody tells.
        throttled: Time in which the control group's quota was used up; `None` where there is none, or nobody tells.
        processors: How many processors `busy` is about.
    """

    at: float
    own: float
    busy: float | None = None
    stolen: float | None = None
    waited: float | None = None
    throttled: float | None = None
    processors: int = 1


def usage(root: Path | str = "/") -> Usage:
    """The counters of this moment.

    Args:
        root: Where `/proc` and `/sys` are found; another folder in tests.
    """
    root = Path(root)
    times = os.times()
    own = times.user + times.system  # of the same ticks as the system's account; `process_time` is finer, and ahead
    busy, stolen, processors = _from_stat(root)
    if busy is None:
        busy, processors = _from_psutil(), os.cpu_count() or 1
    return Usage(time.perf_counter(), own, busy, stolen, waited(root), _throttled(root), processors)


def waited(root: Path | str = "/") -> float | None:
    """Seconds that threads of this process have waited for a processor, or `None` where nobody tells (only Linux does).

    Those of threads that have ended are missing.
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
    except (AttributeError, IndexError, ValueError, OSError):  # no such file here, or not of this form
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
    """The most that any of the process's control groups was held back by its quota."""
    found: list[float] = []
    for folder, _ in groups("cpu", root):
        for line in (read(folder / "cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name in _THROTTLED and value.isdecimal():
                found.append(int(value) / _THROTTLED[name])
    return max(found, default=None)


_THROTTLED = {"throttled_usec": 1e6, "throttled_time": 1e9}  # of cgroup v2, and of v1
