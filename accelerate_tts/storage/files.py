"""Files in a folder that others may write to: read if they are what they should be, written whole or not at all."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate_tts.events import NotApplied, emit

__all__ = [
    "SECRET_BYTES",
    "TEMPORARY",
    "BadFileError",
    "alone",
    "own_folder",
    "read_secret",
    "regular",
    "temporary",
    "touch",
]

SECRET_BYTES = 32
TEMPORARY = ".tmp-"
"""How the names of files begin that are being written, or were when their writer ended."""

_LATEST = 2**62  # ns since 1970, in the year 2116: a stamp in the far future must not push all others beyond 64 bits


class BadFileError(OSError):
    """A file is not what it should be. It is an OSError, for both have the same end: an event, and no file."""


def own_folder(name: str, given: str | os.PathLike[str] | None = None) -> Path:
    """A folder of this user's: the given one, or `accelerate_tts/NAME` in his cache folder.

    A user without a home (a container's, with a number and no entry in passwd) has one in the temporary folder, with a
    `NotApplied` event.
    """
    try:
        if given is not None:
            return Path(given).expanduser()
        base = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME") or "")
        if not base.is_absolute():
            home = Path.home()
            base = home / "AppData" / "Local" if sys.platform == "win32" else home / ".cache"
    except RuntimeError:  # no home
        base = Path()
    if base.is_absolute():
        return base / "accelerate_tts" / name
    try:
        temporary_folder = Path(tempfile.gettempdir())
    except OSError:  # nothing can be written anywhere
        temporary_folder = Path(os.sep, "tmp")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = temporary_folder / f"accelerate_tts-{user}" / name
    why = f"this user has no home folder; {folder} serves instead, for as long as it stays"
    emit(NotApplied(f"the cache folder for {name}", f"{why}: set ACCELERATE_TTS_PACK_FOLDER, or HOME"))
    return folder


@contextmanager
def regular(path: Path, *, follow: bool = False, private: bool = False) -> Generator[IO[bytes], None, None]:
    """Open a regular file for reading. A symbolic link is none unless `follow`, and a pipe does not block."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        _check(path.lstat(), private)  # all that Windows has against a link; what is opened is looked at again
    with os.fdopen(os.open(path, flags), "rb") as file:
        _check(os.fstat(file.fileno()), private)
        yield file


def _check(about: os.stat_result, private: bool) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise BadFileError("it is no regular file")
    user = getattr(os, "geteuid", None)
    if not private or user is None:  # on Windows, the folder's own rights keep others out
        return
    if about.st_uid != user():
        raise BadFileError(f"it belongs to user {about.st_uid}")
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o477 != 0o400:  # noqa: PLR2004 - readable by the owner, and nothing for anybody else
        raise BadFileError(f"its mode is {mode:04o} and must be 0600")


def read_secret(path: Path) -> bytes | None:
    """The secret in this file, `None` if there is no file; `BadFileError` if others may know it or have set it."""
    try:
        with regular(path, private=True) as file:
            found = file.read(SECRET_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(found) != SECRET_BYTES:
        raise BadFileError(f"it does not hold {SECRET_BYTES} bytes")
    return found


@contextmanager
def alone(folder: Path) -> Generator[None, None, None]:
    """Hold the folder's lock, where the platform and its file system have one: two must not replace one secret."""
    if sys.platform == "win32":  # Windows only
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def temporary(folder: Path, parts: Iterable[bytes]) -> Generator[Path, None, None]:
    """Write a file (mode 0600) that is on disk when its path is given, and gone afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        with suppress(OSError):
            Path(name).unlink()


def touch(target: Path | int, after: int = 0) -> None:
    """Note that a file was used now.

    Args:
        target: Its path or its descriptor.
        after: When the last one was used, in ns since 1970: it is later than that, also on a clock that was set back.
    """
    # An explicit time: the kernel's own stamp is some milliseconds coarse, which would blur who was used last.
    with suppress(OSError):
        now = max(time.time_ns(), min(after, _LATEST) + 1)
        os.utime(target, ns=(now, now))
