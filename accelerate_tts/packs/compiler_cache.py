"""The compiler's files of one tuning, as one archive that a warm pack can carry.

inductor keeps what it compiled in a folder (`TORCHINDUCTOR_CACHE_DIR`, by default in the system's temporary one): C++
sources and libraries, serialised graphs, the results of its kernel timings. `torch.compiler.save_cache_artifacts`
(torch 2.14) leaves out the libraries, the timings and every frozen graph, so the files themselves are taken: those that
are new, and those that were there and were found good for it. Which these are, an audit hook tells, to which Python
names each file that is opened.

They are code. Only archives that the pack store has verified may come to `unpack`.
"""

from __future__ import annotations

import getpass
import gzip
import io
import os
import re
import sys
import tarfile
import tempfile
import weakref
import zlib
from pathlib import Path

from accelerate_tts.errors import abridged, message_of
from accelerate_tts.storage.files import BadFileError

__all__ = ["Snapshot", "pack", "snapshot", "unpack"]


class Snapshot(frozenset[str]):
    """The files that were there.

    Attributes:
        opened: Those that this process has opened since.
    """

    opened: set[str]


# Locks and half-written files are of no use to anybody.
_PASSING = (".lock", ".tmp")
_MOST_BYTES = 512 * 1024 * 1024


def snapshot() -> Snapshot:
    """What is in the compiler's folder now; cheap, and imports no compiler."""
    made = Snapshot(_files())
    made.opened = set()
    _watch(made)
    return made


def pack(before: frozenset[str]) -> bytes | None:
    """The files that came since, as a compressed archive; `None` if there are none, or too many to keep.

    Args:
        before: What was there; of a `Snapshot`, what was used since is taken too.
    """
    folder = _folder()
    # A copy, which is made in one step: other threads open files meanwhile.
    used = {_key(name) for name in before.opened.copy()} if isinstance(before, Snapshot) else set[str]()
    names = [
        name for name in sorted(_files()) if (name not in before or _key(name) in used) and not name.endswith(_PASSING)
    ]
    buffer, size = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in names:
            try:
                content = (folder / name).read_bytes()
            except FileNotFoundError:  # another process has tidied up meanwhile
                continue
            size += len(content)
            if size > _MOST_BYTES:
                return None
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue() if names else None


def unpack(archive: bytes, most: int = _MOST_BYTES) -> int:
    """Put the files of an archive where the compiler looks for them. Files that are there already stay.

    Args:
        archive: As `pack` makes it.
        most: Bytes that it may hold, unpacked. No more than that is ever in memory.

    Returns:
        How many were written.

    Raises:
        ValueError: An entry is no plain file inside the folder.
        OSError: It is no such archive, or holds more than `most` (`BadFileError`), or the folder cannot be written.
    """
    try:
        # As a stream: neither the headers nor the files of it can take more memory than was read.
        with (
            gzip.GzipFile(fileobj=io.BytesIO(archive)) as stream,
            tarfile.open(fileobj=_AtMost(stream, most), mode="r|") as content,
        ):
            return sum(_unpacked(content, entry, most) for entry in content)
    except _UNREADABLE as error:
        raise BadFileError(f"the compiled code is damaged: {type(error).__name__}: {message_of(error)}") from error


_UNREADABLE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError, OverflowError)


class _AtMost:
    """A stream that ends with an error after so many bytes: what little was compressed may become very much."""

    def __init__(self, stream: gzip.GzipFile, most: int) -> None:
        headers = most // 8 + 2 * tarfile.RECORDSIZE  # and what fills the last block of each file, and of the archive
        self._stream, self._left = stream, most + headers

    def read(self, size: int) -> bytes:
        """See `io.RawIOBase.read`."""
        found = self._stream.read(min(size, self._left + 1))
        self._left -= len(found)
        if self._left < 0:
            raise BadFileError("the compiled code unpacks to more bytes than it may have")
        return found


def _unpacked(content: tarfile.TarFile, entry: tarfile.TarInfo, most: int) -> bool:
    name = Path(entry.name)
    # On Windows, an anchor is a drive, too.
    if not entry.isfile() or entry.issparse() or name.anchor or not name.parts or ".." in name.parts:
        raise ValueError(f"the entry {abridged(entry.name)} of the compiled code is no plain file in its folder")
    if not 0 <= entry.size <= most:
        raise BadFileError(f"the entry {abridged(entry.name)} of the compiled code has {entry.size} bytes")
    target = _folder() / name
    file = content.extractfile(entry)
    if file is None or target.exists():
        return False
    _write(target, file.read())
    return True


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key(name: str) -> str:
    """By what the compiler names all files of one piece of code: its source, its library, the lock that it takes."""
    return name.rsplit("/", 1)[-1].split(".", 1)[0]


def _watch(snapshot: Snapshot) -> None:
    """Have what is opened in the compiler's folder noted, for as long as somebody has the snapshot."""
    prefix = os.fspath(_folder()) + os.sep
    if not _watched:
        sys.addaudithook(_audit)  # once: Python has no way to take one away
    _watched[:] = [(weakref.ref(snapshot), prefix), *(entry for entry in _watched if entry[0]() is not None)]


def _audit(event: str, given: tuple[object, ...]) -> None:
    # In each process-wide event of Python's: quick, and never raises.
    place = _OPENING.get(event)
    if place is None:
        return
    path = given[place]
    if isinstance(path, str):
        for reference, prefix in _watched:
            if path.startswith(prefix) and (found := reference()) is not None:
                found.opened.add(path[len(prefix) :].replace(os.sep, "/"))


_OPENING = {"open": 0, "import": 1, "ctypes.dlopen": 0}
_watched: list[tuple[weakref.ref[Snapshot], str]] = []


def _folder() -> Path:
    # As inductor names it (torch 2.6 to 2.14), without importing inductor, which takes two seconds.
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if own:
        return Path(own)
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def _files() -> list[str]:
    folder = _folder()
    found: list[str] = []
    for path, _, names in os.walk(folder):
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in names]
    return found
