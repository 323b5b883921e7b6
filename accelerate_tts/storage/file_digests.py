"""Digests of files, cached by identity, and the choice of a digest algorithm."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import OrderedDict
from functools import cache
from typing import IO, Any

from accelerate_tts.locks import lock

DURABLE = "sha256"
"""hashlib's name of the algorithm for digests that other processes and machines read."""

_ALGORITHMS = ("sha256", "blake2b")
# Two writes within one tick of the file system's clock (2 s at worst, on FAT) give the same time.
_SETTLED_NS = 2_000_000_000
_FILES_KNOWN = 4096  # about a kilobyte each
_BLOCK = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 8, 64


class UnknownContentError(TypeError):
    """A value whose content cannot be hashed. The message names it."""


@cache
def fastest() -> str:
    """Return the algorithm that hashes audio fastest on this machine.

    Twelve seconds of audio take SHA-256 0.6 ms on processors with instructions for it, and BLAKE2 1.6 ms; without these
    instructions BLAKE2 is faster. Embedding them takes 90 ms, and a repeated call should take a hundredth of that.
    """
    data = bytes(1 << 17)

    def seconds(algorithm: str) -> float:
        clock = time.perf_counter()
        hashlib.new(algorithm, data)
        return time.perf_counter() - clock

    return min(_ALGORITHMS, key=lambda algorithm: min(seconds(algorithm) for _ in range(3)))


class FileDigests:
    """Digests of files. For an unchanged file, only its metadata and a sample are read again.

    The sample detects writes through a memory mapping, which may not change the file's times.
    """

    def __init__(self) -> None:
        self._lock = lock()
        self._known: OrderedDict[tuple[Any, ...], tuple[bytes, str]] = OrderedDict()

    def digest(self, path: str, algorithm: str = DURABLE) -> str:
        """Return the hex digest of a regular file's bytes.

        Args:
            path: Path of the file.
            algorithm: hashlib's name of the algorithm.

        Raises:
            UnknownContentError: The path is a folder, a pipe or a device.
            OSError: The file cannot be read.
        """
        about = os.stat(path)  # noqa: PTH116 - a text that may not be a path
        if not stat.S_ISREG(about.st_mode):  # checked before opening, since opening a pipe would block
            raise UnknownContentError(f"{path!r} is no regular file, so its content cannot be hashed")
        digest = hashlib.new(algorithm)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as above
            before = os.fstat(file.fileno())
            key = (algorithm, *identity(path, before))
            sample = _sample(file, before.st_size)
            with self._lock:
                known = self._known.get(key)
                if known is not None and known[0] == sample:
                    self._known.move_to_end(key)
                    return known[1]
            file.seek(0)
            read_into(digest, file)
            after = os.fstat(file.fileno())
        now = time.time_ns()
        # Cached only if the last change is old enough that a later change must give other times.
        if identity(path, before) == identity(path, after) and max(after.st_mtime_ns, after.st_ctime_ns) < (
            now - _SETTLED_NS
        ):
            with self._lock:
                self._known[key] = sample, digest.hexdigest()
                while len(self._known) > _FILES_KNOWN:
                    self._known.popitem(last=False)
        return digest.hexdigest()


def read_into(digest: Any, file: IO[bytes]) -> None:
    """Update a digest with the rest of a file, block by block."""
    while block := file.read(_BLOCK):
        digest.update(block)


def _sample(file: IO[bytes], size: int) -> bytes:
    """Read bytes from places all over a file; all of a small file."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return file.read(size)
    found: list[bytes] = []
    for number in range(_SAMPLES):
        file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
        found.append(file.read(_SAMPLE_BYTES))
    return b"".join(found)


def identity(path: str, about: os.stat_result) -> tuple[Any, ...]:
    """Return the metadata that differs after a write.

    Unlike the modification time, the inode's change time cannot be set by a program.
    """
    return (path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
