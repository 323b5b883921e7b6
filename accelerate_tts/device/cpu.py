"""Number of cores that this process may use, and the number of threads for them.

`os.cpu_count()` ignores the affinity mask and a container's quota. A service limited to two cores of a 64-core host
would run 64 busy-waiting OpenMP threads on two cores.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from accelerate_tts.device.cgroup import groups, read

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def affinity_cpus() -> int:
    """Return the number of logical CPUs that this process may run on (all CPUs if the system does not report it)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def quota_cpus(root: Path | str = "/") -> float | None:
    """Return the CPU quota of the process's control group in CPUs, or `None` without a limit.

    It is the smallest limit of the group and its parents, in cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`). A
    missing or unreadable file is no limit.

    Args:
        root: Folder of `/proc` and `/sys`; another folder in tests.
    """
    found = (_LIMITS[version](folder) for folder, version in groups("cpu", root))
    return min((limit for limit in found if limit is not None), default=None)


def usable_cpus() -> int:
    """Return the number of whole CPUs that this process can use: the smaller of affinity and quota, at least 1."""
    quota = quota_cpus()
    affinity = affinity_cpus()
    return affinity if quota is None else max(1, min(affinity, math.floor(quota + 1e-9)))


def recommended_threads(workers: int = 1) -> int:
    """Return the intra-op threads of one of `workers` processes that share the usable CPUs, at least 1."""
    return max(1, usable_cpus() // workers)


def thread_environment(threads: int) -> dict[str, str]:
    """Return environment variables that give OpenMP, MKL and NumExpr `threads` threads that sleep while waiting.

    These libraries read them at start-up, so they affect child processes rather than this one.
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
