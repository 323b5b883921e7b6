"""Folder of files by key, bounded in bytes: written atomically, and the least recently used are evicted first."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from accelerate_tts.errors import PackError
from accelerate_tts.events import PackIgnored, emit
from accelerate_tts.locks import lock
from accelerate_tts.storage.files import TEMPORARY, BadFileError, temporary, touch

_KEY = re.compile(r"[0-9a-f]{16,128}")
_LEFTOVER_SECONDS = 3600.0  # no write takes an hour: the process that made an older temporary file is gone
_MANY = 256  # maximum files of a folder that is scanned after each write; the scan takes negligible time
_SLACK = 16  # with more files, a sixteenth of them may be written between two scans


class LruFolder:
    """Files `<key><suffix>` of one folder, readable by their owner only, for any number of threads and processes.

    The folder is scanned after a write. With more than 256 files it is scanned after as many writes as a sixteenth of
    them, so a process may exceed the limit by that much in between. The folder's own modification time is the time of
    the last use of a file.

    Args:
        folder: Created at the first write, with mode 0700; its files have mode 0600.
        suffix: Suffix of the files' names.
        limit_bytes: Maximum bytes of all files.
        what: Name of the folder in events.
    """

    def __init__(self, folder: Path, suffix: str, limit_bytes: int, what: str) -> None:
        self.folder = folder
        self._suffix = suffix
        self._limit = limit_bytes
        self._what = what
        self._lock = lock()
        self._room = self._writes = 0  # bytes and files that may be written before the next scan

    def path(self, key: str) -> Path:
        """Return the path of a key's file.

        Raises:
            PackError: The key is not 16 to 128 lower-case hex digits.
        """
        if not _KEY.fullmatch(str(key)):  # the key becomes a file name
            raise PackError(f"key={key!r} must be 16 to 128 lower-case hex digits")
        return self.folder / f"{key}{self._suffix}"

    def content(self, file: IO[bytes]) -> bytes:
        """Return the content of an open file.

        Raises:
            BadFileError: It is larger than the limit.
        """
        size = os.fstat(file.fileno()).st_size
        self.check(size)
        return file.read(size)

    def check(self, size: int) -> None:
        """Raise `BadFileError` if a file of this size is larger than the limit."""
        if size > self._limit:
            raise BadFileError(f"its {size} bytes are more than the limit of {self._limit}")

    def used(self, key: str, file: IO[bytes]) -> None:
        """Mark an open file as the most recently used, also after the clock was set back."""
        last = self._last_use()
        # By its descriptor if possible, since the path may refer to another file by now.
        touch(file.fileno() if os.utime in os.supports_fd else self.path(key), last)
        touch(self.folder, last)

    def write(self, key: str, *parts: bytes) -> None:
        """Write a file, replacing an older one of the same key. A failed eviction causes an event.

        Raises:
            OSError: It is too large, or the folder is not writable.
        """
        size = sum(map(len, parts))
        self.check(size)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        last = self._last_use()
        with temporary(self.folder, parts) as made:
            touch(made, last)
            made.replace(self.path(key))
        touch(self.folder, last)
        with self._lock:
            self._room -= size
            self._writes -= 1
            due = self._room < 0 or self._writes < 0
        if due:
            try:
                self._tidy(key)
            except OSError as error:  # on Windows, the oldest file may be open; the next write tries again
                emit(PackIgnored(f"the limit of {self._what} {self.folder}", str(error)))

    def scan(self) -> list[tuple[int, str, int]]:
        """Return the files as (mtime in ns, key, bytes), least recently used first."""
        return self._scan()[0]

    def _scan(self) -> tuple[list[tuple[int, str, int]], list[Path]]:
        """Return `scan`, and the temporary files of crashed writers."""
        found: list[tuple[int, str, int]] = []
        left: list[Path] = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:  # no folder yet
            paths = [Path(entry.path) for entry in entries if entry.name.endswith(self._suffix) or _is_left(entry.name)]
            for path in paths:
                key = path.name.removesuffix(self._suffix)
                with suppress(FileNotFoundError):  # evicted meanwhile
                    about = path.lstat()
                    if _is_left(path.name):
                        if time.time() - about.st_mtime > _LEFTOVER_SECONDS:
                            left.append(path)
                    elif _KEY.fullmatch(key) and stat.S_ISREG(about.st_mode):
                        found.append((about.st_mtime_ns, key, about.st_size))
        return sorted(found), left

    def _last_use(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:  # only the order of eviction suffers
            return 0

    def _tidy(self, written: str) -> None:
        """Evict the least recently used files except `written`, and delete temporary files of crashed writers."""
        found, left = self._scan()
        for path in left:
            path.unlink(missing_ok=True)
        total = sum(size for _, _, size in found)
        # With many files, some more are evicted than necessary; otherwise the next write would scan again.
        many = len(found) > _MANY
        wanted = self._limit - self._limit // _SLACK if many and total > self._limit else self._limit
        for _, key, size in found:
            if total > wanted and key != written:
                self.path(key).unlink(missing_ok=True)
                total -= size
        if found:
            touch(self.folder, max(self._last_use(), found[-1][0]))
        with self._lock:
            self._room, self._writes = self._limit - total, len(found) // _SLACK if many else 0


def _is_left(name: str) -> bool:
    return name.startswith(TEMPORARY)
