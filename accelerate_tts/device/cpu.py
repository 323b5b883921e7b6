"""How many cores this process may really use, and the threads that follow from it.

`os.cpu_count()` knows neither the affinity mask nor a container's quota: a service limited to two cores on a
64-core host then runs 64 busy-waiting OpenMP threads on two cores.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from accelerate_tts.device.cgroup import groups, read

__all__ = ["affinity_cpus", "quota_cpus", "recommended_threads", "thread_environment", "usable_cpus"]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def affinity_cpus() -> int:
    """Logical CPUs that this process may be scheduled on (all of them where the system cannot say)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def quota_cpus(root: Path | str = "/") -> float | None:
    """CPUs' worth of time that the process's control group may use, or `None` without a limit.

    The smallest limit of the group and its parents counts. cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`) are
    read; a file that is missing or unreadable is no limit.

    Args:
        root: Where `/proc` and `/sys` are found; another folder in tests.
    """
    found = (_LIMITS[version](folder) for folder, version in groups("cpu", root))
    return min((limit for limit in found if limit is not None), default=None)


def usable_cpus() -> int:
    """Whole CPUs that this process can keep busy: the smaller of affinity and quota, at least 1."""
    quota = quota_cpus()
    affinity = affinity_cpus()
    return affinity if quota is None else max(1, min(affinity, math.floor(quota + 1e-9)))


def recommended_threads(workers: int = 1) -> int:
    """Intra-op threads for one of `workers` processes that share the usable CPUs, at least 1."""
    return max(1, usable_cpus() // workers)


def thread_environment(threads: int) -> dict[str, str]:
    """The environment variables that give OpenMP, MKL and NumExpr `threads` threads which sleep while they wait.

    They are read when those libraries start, so they reach child processes, not this one.
    """
    return {**dict.fromkeys(_THREAD_VARIABLES, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}


def _v2_limit(folder: Path) -> float | None:
    fields = (read(folder / "cpu.max") or "").split()
    if len(fields) != 2 or fields[0] == "max":  # noqa: PLR2004
        return None
    return _ratio(*fields)


def _v1_limit(folder: Path) -> float | None:
    return _ratio(read(folder / "cpu.cfs_quota_us") or "", read(folder / "cpu.cfs_period_us") or "")


def _ratio(quota: str, period: str) -> float | None:
    try:
        time, window = int(quota), int(period)
        return time / window if time > 0 and window > 0 else None
    except (ValueError, OverflowError):
        return None


_LIMITS = {2: _v2_limit, 1: _v1_limit}
