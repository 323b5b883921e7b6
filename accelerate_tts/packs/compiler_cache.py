"""Archive of the compiler's cached files of one tuning, for a warm pack.

inductor stores compiled code in a folder (`TORCHINDUCTOR_CACHE_DIR`, by default in the system's temporary folder): C++
sources and libraries, serialised graphs, results of kernel timings. `torch.compiler.save_cache_artifacts` (torch 2.14)
omits the libraries, the timings and all frozen graphs, so the files themselves are archived. These are the new files,
and existing ones that the tuning has used. An audit hook observes the files that Python opens.

The files are code. Only archives that the pack store has verified may be unpacked.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from accelerate_tts.device.compiler_folder import cache_folder
from accelerate_tts.errors import abridged, described
from accelerate_tts.storage.files import BadFileError, named_by


class Snapshot(frozenset[str]):
    """Names of the files that existed.

    Attributes:
        opened: Files that this process has opened since.
    """

    opened: set[str]


# Locks and unfinished files are skipped.
_PASSING = (".lock", ".tmp")
_MOST_BYTES = 512 * 1024 * 1024


def snapshot() -> Snapshot:
    """List the compiler's folder. Cheap, and imports no compiler. Where none can be made, there are no files."""
    try:
        folder = cache_folder()
    except FileNotFoundError:
        made = Snapshot()
        made.opened = set()
        return made
    made = Snapshot(_files(folder))
    made.opened = set()
    _watch(made, folder)
    return made


def pack(before: frozenset[str], most: int = _MOST_BYTES) -> bytes | None:
    """Archive the files that are new since a snapshot, compressed; `None` if there are none, or they are too large.

    Args:
        before: The earlier files. For a `Snapshot`, files that were used since are included, too.
        most: Maximum bytes of the files.
    """
    folder = cache_folder()
    # An atomic copy, since other threads open files meanwhile.
    used = {_key(name) for name in before.opened.copy()} if isinstance(before, Snapshot) else set[str]()
    names = [
        name
        for name in sorted(_files(folder))
        if (name not in before or _key(name) in used) and not name.endswith(_PASSING)
    ]
    buffer, size = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in names:
            try:
                content = (folder / name).read_bytes()
            except FileNotFoundError:  # another process may have cleaned up
                continue
            size += len(content)
            if size > most:
                return None
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue() if names else None


def unpack(archive: bytes, most: int = _MOST_BYTES) -> int:
    """Extract an archive to the compiler's folder. Existing files are kept.

    Args:
        archive: An archive that `pack` made.
        most: Maximum unpacked bytes, which is also the maximum in memory.

    Returns:
        Number of files written.

    Raises:
        ValueError: An entry is not a plain file inside the folder.
        OSError: The archive is invalid or larger than `most` (`BadFileError`), or the folder cannot be written.
    """
    try:
        # As a stream, so that neither headers nor files can take more memory than was read.
        with (
            gzip.GzipFile(fileobj=io.BytesIO(archive)) as stream,
            tarfile.open(fileobj=cast("IO[bytes]", _AtMost(stream, most)), mode="r|") as content,
        ):
            return sum(_unpacked(content, entry, most) for entry in content)
    except _UNREADABLE as error:
        raise BadFileError(f"the compiled code is damaged: {described(error)}") from error


_UNREADABLE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError, OverflowError)


class _AtMost:
    """A stream with a maximum number of bytes, since a small compressed file may unpack to a very large one."""

    def __init__(self, stream: gzip.GzipFile, most: int) -> None:
        headers = most // 8 + 2 * tarfile.RECORDSIZE  # also the padding of each file's and the archive's last block
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
    target = cache_folder() / name
    file = content.extractfile(entry)
    if file is None or target.exists():
        return False
    _write(target, file.read())
    return True


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with named_by(target.parent):
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key(name: str) -> str:
    """Return the common part of the names of all files of one piece of code: source, library and lock."""
    return name.rsplit("/", 1)[-1].split(".", 1)[0]


def _watch(snapshot: Snapshot, folder: Path) -> None:
    """Record opened files of the compiler's folder while the snapshot is alive."""
    prefix = os.fspath(folder) + os.sep
    if not watched:
        sys.addaudithook(_recorder(watched, os.sep))  # once, since Python cannot remove an audit hook
    watched[:] = [(weakref.ref(snapshot), prefix), *(entry for entry in watched if entry[0]() is not None)]


def _recorder(
    watched: list[tuple[weakref.ref[Snapshot], str]], separator: str
) -> Callable[[str, tuple[object, ...]], None]:
    """Make the audit hook. It uses no global: an exiting interpreter sets these to `None`, and opens files."""
    opening = {"open": 0, "import": 1, "ctypes.dlopen": 0}

    def record(event: str, given: tuple[object, ...]) -> None:
        # Called for each audit event of the process, so it is quick and never raises.
        place = opening.get(event)
        if place is None:
            return
        path = given[place]
        if isinstance(path, str):
            for reference, prefix in watched:
                if path.startswith(prefix) and (found := reference()) is not None:
                    found.opened.add(path[len(prefix) :].replace(separator, "/"))

    return record


watched: list[tuple[weakref.ref[Snapshot], str]] = []
"""Living snapshots, each with the prefix of the paths that it records, newest first."""


def _files(folder: Path) -> list[str]:
    found: list[str] = []
    for path, _, names in os.walk(folder):
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in names]
    return found
