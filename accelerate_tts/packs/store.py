"""Store of warm packs: decisions of tuning and compiled code, for the next process.

Packs are signed with a secret of this user, or one that is shared through ACCELERATE_TTS_PACK_KEY. Each is a file
`<key>.pack`; `format.py` defines its content.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from accelerate_tts.errors import PackError
from accelerate_tts.events import PackIgnored, emit
from accelerate_tts.packs.format import LINE_LIMIT, MOST_DECISIONS, Pack, sealed, unpack
from accelerate_tts.storage.files import (
    SECRET_BYTES,
    TEMPORARY,
    BadFileError,
    alone,
    read_secret,
    regular,
    temporary,
    touch,
)

__all__ = ["Pack", "PackInfo", "PackStore"]

_EXPORT_MAGIC = b"accelerate-tts packs 1\n"
_EXPORT_ENTRY = re.compile(rb"([0-9a-f]{16,128}) ([0-9]{1,15})\n")
_EXPORT_END = b"end\n"
_KEY = re.compile(r"[0-9a-f]{16,128}")
_LEFTOVER_SECONDS = 3600.0  # no write takes an hour: the process that made an older temporary file is gone
_SHARE = "set ACCELERATE_TTS_PACK_KEY to the same secret on both machines to ship compiled code"


@dataclass(frozen=True)
class PackInfo:
    """A pack in the folder: its key, size in bytes, and time of the last write or read (seconds since 1970)."""

    key: str
    bytes: int
    used: float


class PackStore:
    """Warm packs in one folder, shared by any number of threads and processes.

    A folder that cannot be read or written, and a file that is damaged or signed by others, cause a `PackIgnored`
    event, not an exception.

    Args:
        folder: Folder of the packs. The first write creates it, with mode 0700.
        limit_bytes: Maximum bytes of all packs. The least recently used are evicted first.
        secret: Secret for signatures. Without one (or with an empty one), a random one is stored in the folder.
    """

    def __init__(self, folder: Path, limit_bytes: int, secret: bytes | None = None) -> None:
        self._folder = Path(folder)
        self._limit = limit_bytes
        self._given = secret or None

    def read(self, key: str) -> Pack | None:
        """Read the pack of a key; `None` without one. Its artifacts are `None` unless its signature is valid.

        Raises:
            PackError: `key` is not 16 to 128 lower-case hex digits.
        """
        path = self._path(key)
        try:
            with regular(path) as file:
                pack, authentic, _ = unpack(self._content(file), key, self._known_secret())
                # By its descriptor if possible, since the path may refer to another file by now.
                touch(file.fileno() if os.utime in os.supports_fd else path, self._last_use())
        except FileNotFoundError:
            return None
        except OSError as error:
            _ignored(key, error)
            return None
        if not authentic:
            _unverified(key)
        return pack

    def write(self, pack: Pack) -> bool:
        """Write a pack, replacing an older one of its key.

        Returns:
            True if it was written; False with an event otherwise.

        Raises:
            PackError: The key is invalid, or the decisions are not serialisable as JSON (NaN and infinities included)
                within 4 MiB.
        """
        self._path(pack.key)
        try:
            text = json.dumps(dict(pack.decisions), allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise PackError(f"the decisions of warm pack {pack.key[:12]} cannot be written as JSON: {error}") from error
        if len(text) > MOST_DECISIONS:
            raise PackError(
                f"the decisions of warm pack {pack.key[:12]} take {len(text)} bytes, and may take {MOST_DECISIONS}"
            )
        try:
            secret = self._known_secret() or self._new_secret()
        except OSError as error:
            _ignored(pack.key, f"it could not be kept: {error}")
            return False
        return self._store(pack.key, *sealed(pack.key, text, pack.artifacts, secret))

    def entries(self) -> list[PackInfo]:
        """List the packs in the folder, most recently used first. Their content is not checked."""
        try:
            return [PackInfo(key, size, used / 1e9) for used, key, size in reversed(self._scan())]
        except OSError as error:
            emit(PackIgnored(f"the warm pack folder {self._folder}", str(error)))
            return []

    def clear(self) -> int:
        """Remove every pack, and return their number. The secret stays.

        Raises:
            PackError: A pack cannot be removed.
        """
        count = 0
        try:
            for _, key, _ in self._scan():
                with suppress(FileNotFoundError):  # evicted meanwhile
                    self._path(key).unlink()
                    count += 1
        except OSError as error:
            raise PackError(f"the warm packs in {self._folder} cannot be removed: {error}") from error
        return count

    def export(self, keys: Iterable[str] | None, path: Path) -> int:
        """Write packs (all if `keys` is `None`), with their signatures, into one file for another machine.

        Returns:
            Number of packs in the file. A damaged pack causes an event and is skipped.

        Raises:
            PackError: There is no pack of a given key, the file cannot be written, or `path` is a device, a pipe or a
                folder.
        """
        target = _replaceable(path)
        # The most recently used comes last, so that the order of use is the same after loading.
        wanted = [info.key for info in reversed(self.entries())] if keys is None else list(dict.fromkeys(keys))
        count = 0

        def parts() -> Generator[bytes, None, None]:  # one pack in memory at a time
            nonlocal count
            yield _EXPORT_MAGIC
            for key in wanted:
                try:
                    with regular(self._path(key)) as file:
                        content = self._content(file)
                    unpack(content, key, None)
                except FileNotFoundError:
                    if keys is None:
                        continue  # evicted since the folder was listed
                    raise PackError(f"there is no warm pack {key!r} in {self._folder}") from None
                except OSError as error:
                    _ignored(key, error)
                    continue
                count += 1
                yield b"%s %d\n" % (key.encode(), len(content))
                yield content
            yield _EXPORT_END

        try:
            with temporary(target.parent, parts()) as made:
                made.replace(target)
        except OSError as error:
            raise PackError(f"{path} cannot be written: {error}") from error
        return count

    def load(self, path: Path) -> int:
        """Load the packs of an exported file into this folder. A pack that is not loaded causes an event.

        A pack that is not signed with this folder's secret is loaded without artifacts and stays unsigned. It does not
        replace a signed pack of the same key.

        Returns:
            Number of packs loaded.

        Raises:
            PackError: The file cannot be read, or is not an export of this format version.
        """
        count = 0
        try:
            secret = self._known_secret()
            with regular(Path(path), follow=True) as file:
                if file.readline(LINE_LIMIT) != _EXPORT_MAGIC:
                    raise PackError(f"{path} is no export of warm packs, or one of another format version")
                while entry := _EXPORT_ENTRY.fullmatch(line := file.readline(LINE_LIMIT)):
                    key, size = entry[1].decode(), int(entry[2])
                    if size > self._limit:
                        _ignored(key, f"its {size} bytes are more than the limit of {self._limit}")
                        file.seek(size, os.SEEK_CUR)
                    else:
                        count += self._take(key, file.read(size), secret)
        except OSError as error:
            raise PackError(f"{path} cannot be loaded: {error}") from error
        if line != _EXPORT_END:
            emit(PackIgnored(f"the rest of {path}", "it is damaged or cut short"))
        return count

    def _take(self, key: str, content: bytes, secret: bytes | None) -> bool:
        try:
            _, authentic, text = unpack(content, key, secret)
        except OSError as error:
            _ignored(key, error)
            return False
        if authentic:
            return self._store(key, content)
        with suppress(OSError), regular(self._path(key)) as file:
            _, known, _ = unpack(self._content(file), key, secret)
            if known:
                _ignored(key, f"it is signed with another secret, unlike the one that is here; {_SHARE}")
                return False
        _unverified(key)
        # Unsigned, since this user's signature would vouch for unverified content.
        return self._store(key, *sealed(key, text, None, None))

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(str(key)):  # the key becomes a file name
            raise PackError(f"key={key!r} must be 16 to 128 lower-case hex digits")
        return self._folder / f"{key}.pack"

    def _content(self, file: IO[bytes]) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if size > self._limit:
            raise BadFileError(f"its {size} bytes are more than the limit of {self._limit}")
        return file.read(size)

    def _scan(self) -> list[tuple[int, str, int]]:
        """Return the packs as (mtime in ns, key, bytes), least recently used first."""
        found: list[tuple[int, str, int]] = []
        with suppress(FileNotFoundError):  # no folder yet
            for path in self._folder.iterdir():
                if path.suffix == ".pack" and _KEY.fullmatch(path.stem):
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        about = path.lstat()
                        if stat.S_ISREG(about.st_mode):
                            found.append((about.st_mtime_ns, path.stem, about.st_size))
        return sorted(found)

    def _last_use(self) -> int:
        try:
            return max((used for used, _, _ in self._scan()), default=0)
        except OSError:  # only the order of eviction suffers
            return 0

    def _store(self, key: str, *parts: bytes) -> bool:
        try:
            if (size := sum(map(len, parts))) > self._limit:
                raise BadFileError(f"its {size} bytes are more than the limit of {self._limit}")
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with temporary(self._folder, parts) as made:
                touch(made, self._last_use())
                made.replace(self._path(key))
        except OSError as error:
            _ignored(key, f"it could not be kept: {error}")
            return False
        try:
            self._tidy(key)
        except OSError as error:  # on Windows, the oldest pack may be open; the next write tries again
            emit(PackIgnored(f"the limit of the warm pack folder {self._folder}", str(error)))
        return True

    def _tidy(self, written: str) -> None:
        """Evict the least recently used packs except `written`, and delete temporary files of crashed writers."""
        packs = self._scan()
        excess = sum(size for _, _, size in packs) - self._limit
        for _, key, size in packs:
            if excess > 0 and key != written:
                self._path(key).unlink(missing_ok=True)
                excess -= size
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.name.startswith(TEMPORARY) and time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _known_secret(self) -> bytes | None:
        if self._given is not None:
            return self._given
        path = self._folder / "secret"
        try:
            return read_secret(path)
        except BadFileError as error:
            emit(PackIgnored(f"the secret {path}", f"{error}; the next pack that is written gets a fresh one"))
            return None

    def _new_secret(self) -> bytes:
        """Create the folder's secret, or read the one that another process has created meanwhile."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / "secret"
        with alone(self._folder):
            try:
                found = read_secret(path)
            except BadFileError:
                path.unlink()
                found = None
            if found is not None:
                return found
            fresh = secrets.token_bytes(SECRET_BYTES)
            # The complete file is linked to its name only if the name is free, which is safe without the lock, too.
            with temporary(self._folder, [fresh]) as made:
                try:
                    os.link(made, path)
                except FileExistsError:
                    found = read_secret(path)
                except OSError:  # a file system without hard links
                    made.rename(path)
            return found or fresh


def _replaceable(path: Path) -> Path:
    """Resolve a path for writing. It must not exist, or be a regular file."""
    try:
        target = Path(path).resolve()
        regular_or_none = not target.exists() or target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a circular link, or an invalid name
        raise PackError(f"{path} cannot be written: {error}") from error
    if not regular_or_none:
        raise PackError(f"{path} cannot be written: it is no regular file and would be replaced by one; name a file")
    return target


def _ignored(key: str, reason: object) -> None:
    emit(PackIgnored(f"warm pack {key[:12]}", str(reason)))


def _unverified(key: str) -> None:
    emit(PackIgnored(f"the compiled code of warm pack {key[:12]}", f"it is signed with another secret; {_SHARE}"))
