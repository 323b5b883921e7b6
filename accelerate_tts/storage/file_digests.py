"""Digests of files and of anything else: by which algorithm, and when a file need not be read again."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import OrderedDict
from functools import cache
from typing import IO, Any

from accelerate_tts.locks import lock

__all__ = ["DURABLE", "FileDigests", "UnknownContentError", "fastest"]

DURABLE = "sha256"
"""hashlib's name of the algorithm for what other processes and machines read."""

_ALGORITHMS = ("sha256", "blake2b")
# A file that was written twice within one tick of its file system's clock (2 s at worst, on FAT) shows one time.
_SETTLED_NS = 2_000_000_000
_FILES_KNOWN = 4096  # about a kilobyte each
_BLOCK = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 8, 64


class UnknownContentError(TypeError):
    """A value whose content cannot be told; the message says which, for people."""


@cache
def fastest() -> str:
    """What digests audio in the least time here.

    Twelve seconds of it take SHA-256 0.6 ms where the processor has instructions for that, and BLAKE2 1.6 ms; without
    them it is the other way round. Embedding them takes 90 ms, of which a repeat should cost a hundredth.
    """
    data = bytes(1 << 17)

    def seconds(algorithm: str) -> float:
        clock = time.perf_counter()
        hashlib.new(algorithm, data)
        return time.perf_counter() - clock

    return min(_ALGORITHMS, key=lambda algorithm: min(seconds(algorithm) for _ in range(3)))


class FileDigests:
    """Digests of files; one that has not changed since it was read costs a look at its times and at a sample of it.

    The sample is for what changes no time: a file that is written through a mapping of it in memory.
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._known: OrderedDict[tuple[Any, ...], tuple[bytes, str]] = OrderedDict()

    def digest(self, path: str, algorithm: str = DURABLE) -> str:
        """The hex digest of a regular file's bytes.

        Args:
            path: Of the file.
            algorithm: hashlib's name of what digests it.

        Raises:
            UnknownContentError: It is a folder, a pipe or a device.
            OSError: It cannot be read.
        """
        about = os.stat(path)  # noqa: PTH116 - a text that may be no path at all
        if not stat.S_ISREG(about.st_mode):  # before it is opened: opening a pipe would wait for its other end
            raise UnknownContentError(f"{path!r} is no regular file, whose content could be told")
        digest = hashlib.new(algorithm)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as above
            before = os.fstat(file.fileno())
            key = (algorithm, *_identity(path, before))
            sample = _sample(file, before.st_size)
            with self._lock:
                known = self._known.get(key)
                if known is not None and known[0] == sample:
                    self._known.move_to_end(key)
                    return known[1]
            file.seek(0)
            while block := file.read(_BLOCK):
                digest.update(block)
            after = os.fstat(file.fileno())
        now = time.time_ns()
        # Only what has long been as it is: a later change of it shows in its times for certain.
        if _identity(path, before) == _identity(path, after) and max(after.st_mtime_ns, after.st_ctime_ns) < (
            now - _SETTLED_NS
        ):
            with self._lock:
                self._known[key] = sample, digest.hexdigest()
                while len(self._known) > _FILES_KNOWN:
                    self._known.popitem(last=False)
        return digest.hexdigest()


def _sample(file: IO[bytes], size: int) -> bytes:
    """Bytes from all over a file; all of a small one."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return file.read(size)
    found: list[bytes] = []
    for number in range(_SAMPLES):
        file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
        found.append(file.read(_SAMPLE_BYTES))
    return b"".join(found)


def _identity(path: str, about: os.stat_result) -> tuple[Any, ...]:
    # The time of the last change of the inode cannot be set by hand, unlike that of the content.
    return (path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
