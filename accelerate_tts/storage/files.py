"""Files in folders that other users may write to: checked before reading, and written atomically."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate_tts.events import NotApplied, emit

SECRET_BYTES = 32
TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files."""

_LATEST = 2**62  # ns since 1970 (the year 2116): a time in the far future must not push others beyond 64 bits


class BadFileError(OSError):
    """A file is of a wrong kind, owner or mode. It is an OSError, since callers handle both alike."""


def own_folder(name: str, given: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder of this user: the given one, or `accelerate_tts/NAME` in the user's cache folder.

    For a user without a home (a container's numeric user without a passwd entry) it is in the temporary folder, and a
    `NotApplied` event is emitted.
    """
    try:
        if given is not None:
            return Path(given).expanduser()
        base = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME") or "")
        if not base.is_absolute():
            home = Path.home()
            base = home / "AppData" / "Local" if sys.platform == "win32" else home / ".cache"
    except RuntimeError:  # the user has no home
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
    """Open a regular file for reading. Never blocks on a pipe.

    Args:
        path: Path of the file.
        follow: Accept a symbolic link.
        private: Require that the file belongs to this user, and that no other user may access it.

    Raises:
        BadFileError: The file is not regular, or not private.
        OSError: The file cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        _check(path.lstat(), private)  # the only check against links on Windows; the open file is checked again
    with os.fdopen(os.open(path, flags), "rb") as file:
        _check(os.fstat(file.fileno()), private)
        yield file


def _check(about: os.stat_result, private: bool) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise BadFileError("it is no regular file")
    user = getattr(os, "geteuid", None)
    if not private or user is None:  # on Windows, the folder's access rights protect the file
        return
    if about.st_uid != user():
        raise BadFileError(f"it belongs to user {about.st_uid}")
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o477 != 0o400:  # noqa: PLR2004 - readable by the owner, no access for others
        raise BadFileError(f"its mode is {mode:04o} and must be 0600")


def read_secret(path: Path) -> bytes | None:
    """Read the secret in a file; `None` without a file.

    Raises:
        BadFileError: Other users may have read or set the secret, or it has a wrong length.
    """
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
    """Hold the folder's lock, if the platform and the file system support it, so that one process makes a secret."""
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
def named_by(folder: Path) -> Generator[None, None, None]:
    """While open, an error about a new file names its folder, so that the same state has the same text each time.

    Raises:
        OSError: The block raised one that has a number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(folder)) from error


@contextmanager
def temporary(folder: Path, parts: Iterable[bytes]) -> Generator[Path, None, None]:
    """Write a file (mode 0600) to disk, yield its path, and delete it at the end unless it was renamed."""
    with named_by(folder):
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


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yield the path of a new file that takes the place of `path` at the end.

    If the block raises, what was there before stays. The folder must have room for both. A pipe or a device, and a file
    in a folder that cannot be written, are written in place: then `path` itself is yielded.

    Args:
        path: Path of the file. A link is followed. The mode of an existing file stays.

    Raises:
        OSError: It cannot be written, or the block raised one that has a number; the error names `path`.
    """
    try:
        target = path.resolve()
        made = _beside(target)
        if made is None:
            yield path
            return
        try:
            yield made
            made.replace(target)
        finally:
            with suppress(OSError):
                made.unlink()
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def _beside(target: Path) -> Path | None:
    """Make an empty file beside another one; `None` where the other one has to be written itself."""
    if target.exists() and not target.is_file():
        return None
    made = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666
    try:
        os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except PermissionError:
        return None
    return made


def write_whole(path: Path, text: str) -> None:
    """Write a text file as a whole: if it cannot be written, what was there before stays. See `replacing`.

    Args:
        path: Path of the file.
        text: Its content, written as UTF-8.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")


def touch(target: Path | int, after: int = 0) -> None:
    """Set a file's time of last use to now.

    Args:
        target: Its path or its descriptor.
        after: Time of the previous use, in ns since 1970. The new time is later, also after the clock was set back.
    """
    # An explicit time: the kernel's own has a resolution of milliseconds, too coarse for the order of uses.
    with suppress(OSError):
        now = max(time.time_ns(), min(after, _LATEST) + 1)
        os.utime(target, ns=(now, now))
