"""Threads of the OpenBLAS libraries that other packages (NumPy, SciPy) load into this process.

After each product, OpenBLAS's worker threads spin for some 25 ms (2**26 cycles, its `THREAD_TIMEOUT`) to wait for more
work. On a machine with few cores they slow down torch's OpenMP threads, whose barriers wait for the slowest. A speaker
encoder right after a mel spectrogram took 2.3 times as long (docs/decisions/0012-work-beside-the-model.md). With one
thread, OpenBLAS has no workers.

threadpoolctl supports every BLAS, but is not a dependency of the core, and one function of one library is enough here.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from accelerate_tts.device.flags import Flag

# Builds differ in a prefix (SciPy's wheels) and a suffix (64-bit integers).
_NAMES = [
    (f"{prefix}openblas_get_num_threads{suffix}", f"{prefix}openblas_set_num_threads{suffix}")
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
]


class BlasLibrary:
    """One loaded OpenBLAS."""

    def __init__(self, path: str, get: Any, set_: Any) -> None:
        self.path = path
        self._get = get
        self._set = set_

    @property
    def threads(self) -> int:
        """Number of threads."""
        return int(self._get())

    @threads.setter
    def threads(self, count: int) -> None:
        self._set(ctypes.c_int(count))


def busy_libraries() -> list[str]:
    """Return the paths of loaded OpenBLAS libraries with more than one thread. They are found on Linux only."""
    return [library.path for library in loaded_libraries() if library.threads > 1]


def loaded_libraries() -> list[BlasLibrary]:
    """Return the OpenBLAS libraries that are loaded now."""
    found = (opened(path) for path in loaded_paths())
    return [library for library in found if library is not None]


def loaded_paths() -> list[str]:
    """Return the paths of loaded files that are OpenBLAS by their name, from the process's memory maps."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # another system; NumPy for macOS uses Accelerate, which does not spin
        return []
    # address permissions offset device inode path
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if "openblas" in line}
    return sorted(path for path in paths if ".so" in path)


def opened(path: str) -> BlasLibrary | None:
    """Return the loaded library of this path; `None` if it is not loaded, or no OpenBLAS."""
    try:
        # Finds the loaded library without loading one: if its file was replaced or removed since (by an upgrade under a
        # running process), another library must not be loaded.
        library = ctypes.CDLL(path, mode=getattr(os, "RTLD_NOLOAD", 0))
    except OSError:
        return None
    for getter, setter in _NAMES:
        if hasattr(library, getter) and hasattr(library, setter):
            return BlasLibrary(path, getattr(library, getter), getattr(library, setter))
    return None


# Threads of libraries that were loaded after the first holder saved the state.
_later: dict[str, int] = {}


def _save() -> dict[str, int]:
    _later.clear()
    return {library.path: library.threads for library in loaded_libraries()}


def _restore(saved: dict[str, int]) -> None:
    before = {**_later, **saved}
    for library in loaded_libraries():
        if library.path in before:
            library.threads = before[library.path]


def _write(count: int) -> None:
    for library in loaded_libraries():
        _later.setdefault(library.path, library.threads)
        library.threads = count


BLAS_THREADS = Flag("OpenBLAS threads", _write, _save, _restore)
"""Number of threads of each OpenBLAS library that is loaded when the flag is set."""
