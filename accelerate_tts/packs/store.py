"""Store of warm packs: decisions of tuning and compiled code, for the next process.

Packs are signed with a secret of this user, or one that is shared through ACCELERATE_TTS_PACK_KEY. Each is a file
`<key>.pack`; `format.py` defines its content.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate_tts.errors import PackError
from accelerate_tts.events import PackIgnored, emit
from accelerate_tts.packs.format import LINE_LIMIT, MOST_DECISIONS, Pack, sealed, unpack
from accelerate_tts.storage.files import SECRET_BYTES, BadFileError, alone, own_folder, read_secret, regular, temporary
from accelerate_tts.storage.lru_folder import LruFolder

if TYPE_CHECKING:
    from accelerate_tts.settings import Settings

_EXPORT_MAGIC = b"accelerate-tts packs 1\n"
_EXPORT_ENTRY = re.compile(rb"([0-9a-f]{16,128}) ([0-9]{1,15})\n")
_EXPORT_END = b"end\n"
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
        self._files = LruFolder(Path(folder), ".pack", limit_bytes, "the warm pack folder")
        self._given = secret or None

    def read(self, key: str) -> Pack | None:
        """Read the pack of a key; `None` without one. Its artifacts are `None` unless its signature is valid.

        Raises:
            PackError: `key` is not 16 to 128 lower-case hex digits.
        """
        try:
            with regular(self._files.path(key)) as file:
                pack, authentic, _ = unpack(self._files.content(file), key, self._known_secret())
                self._files.used(key, file)
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
        self._files.path(pack.key)
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
            _ignored(pack.key, f"it could not be written: {error}")
            return False
        return self._store(pack.key, *sealed(pack.key, text, pack.artifacts, secret))

    def entries(self) -> list[PackInfo]:
        """List the packs in the folder, most recently used first. Their content is not checked."""
        try:
            return [PackInfo(key, size, used / 1e9) for used, key, size in reversed(self._files.scan())]
        except OSError as error:
            emit(PackIgnored(f"the warm pack folder {self._files.folder}", str(error)))
            return []

    def clear(self) -> int:
        """Remove every pack, and return their number. The secret stays.

        Raises:
            PackError: A pack cannot be removed.
        """
        count = 0
        try:
            for _, key, _ in self._files.scan():
                with suppress(FileNotFoundError):  # evicted meanwhile
                    self._files.path(key).unlink()
                    count += 1
        except OSError as error:
            raise PackError(f"the warm packs in {self._files.folder} cannot be removed: {error}") from error
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
                    with regular(self._files.path(key)) as file:
                        content = self._files.content(file)
                    unpack(content, key, None)
                except FileNotFoundError:
                    if keys is None:
                        continue  # evicted since the folder was listed
                    raise PackError(f"there is no warm pack {key!r} in {self._files.folder}") from None
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
                    try:
                        self._files.check(size)
                    except BadFileError as error:
                        _ignored(key, error)
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
        with suppress(OSError), regular(self._files.path(key)) as file:
            _, known, _ = unpack(self._files.content(file), key, secret)
            if known:
                _ignored(key, f"it is signed with another secret, unlike the one that is here; {_SHARE}")
                return False
        _unverified(key)
        # Unsigned, since this user's signature would vouch for unverified content.
        return self._store(key, *sealed(key, text, None, None))

    def _store(self, key: str, *parts: bytes) -> bool:
        try:
            self._files.write(key, *parts)
        except OSError as error:
            _ignored(key, f"it could not be written: {error}")
            return False
        return True

    def _known_secret(self) -> bytes | None:
        if self._given is not None:
            return self._given
        path = self._files.folder / "secret"
        try:
            return read_secret(path)
        except BadFileError as error:
            emit(PackIgnored(f"the secret {path}", f"{error}; the next pack that is written gets a fresh one"))
            return None

    def _new_secret(self) -> bytes:
        """Create the folder's secret, or read the one that another process has created meanwhile."""
        self._files.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._files.folder / "secret"
        with alone(self._files.folder):
            try:
                found = read_secret(path)
            except BadFileError:
                path.unlink()
                found = None
            if found is not None:
                return found
            fresh = secrets.token_bytes(SECRET_BYTES)
            # The complete file is linked to its name only if the name is free, which is safe without the lock, too.
            with temporary(self._files.folder, [fresh]) as made:
                try:
                    os.link(made, path)
                except FileExistsError:
                    found = read_secret(path)
                except OSError:  # a file system without hard links
                    made.rename(path)
            return found or fresh


def pack_folder(settings: Settings) -> Path:
    """Folder of warm packs: `settings.pack_folder`, or `accelerate_tts/packs` in the user's cache folder."""
    return own_folder("packs", settings.pack_folder)


def pack_store(settings: Settings) -> PackStore:
    """Return the store of warm packs of the settings."""
    # An environment variable may contain bytes that are not UTF-8.
    secret = None if settings.pack_key is None else settings.pack_key.encode(errors="surrogateescape")
    return PackStore(pack_folder(settings), settings.pack_limit_mb * 1024 * 1024, secret)


def _replaceable(path: Path) -> Path:
    """Resolve a path for writing. It must not exist, or be a regular file."""
    try:
        target = Path(path).resolve()
        # Not `exists`: it is False for a circular link, which `resolve` returns since Python 3.13.
        regular_or_none = target.is_file() or not os.path.lexists(target)
    except (OSError, RuntimeError, ValueError) as error:  # a circular link before 3.13, or an invalid name
        raise PackError(f"{path} cannot be written: {error}") from error
    if not regular_or_none:
        raise PackError(f"{path} cannot be written: it is no regular file and would be replaced by one; name a file")
    return target


def _ignored(key: str, reason: object) -> None:
    emit(PackIgnored(f"warm pack {key[:12]}", str(reason)))


def _unverified(key: str) -> None:
    emit(PackIgnored(f"the compiled code of warm pack {key[:12]}", f"it is signed with another secret; {_SHARE}"))
