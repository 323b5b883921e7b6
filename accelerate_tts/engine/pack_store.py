"""The room where warm packs lie: what a tuning decided and the compiler's artifacts, kept for the next process.

Artifacts run as code once they are loaded, so they are handed out only under a right HMAC-SHA256: by a secret that is
this user's own, or shared on purpose through ACCELERATE_TTS_PACK_KEY. Decisions are plain JSON and harmless: a right
checksum is enough. Nothing here is pickled. The file `<key>.pack` is a line with the format version; a line of JSON
with the key, and size and SHA-256 of the decisions and of the artifacts; these two; and 32 bytes of HMAC over all that
comes before, which are zeros where nobody vouches for it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from accelerate_tts.errors import PackError
from accelerate_tts.events import PackIgnored, emit

__all__ = ["Pack", "PackInfo", "PackStore"]

_MAGIC = b"accelerate-tts pack 1\n"
_EXPORT_MAGIC = b"accelerate-tts packs 1\n"
_EXPORT_ENTRY = re.compile(rb"([0-9a-f]{16,128}) ([0-9]{1,15})\n")
_EXPORT_END = b"end\n"
_LINE_LIMIT = 1024  # bytes; the longest key, two sizes and two digests are below 400
_SECRET_BYTES = 32
_UNSIGNED = bytes(32)
_KEY = re.compile(r"[0-9a-f]{16,128}")
_TEMPORARY = ".tmp-"
_LEFTOVER_SECONDS = 3600.0  # no write takes an hour: the process that made such a file is gone
_SHARE = "set ACCELERATE_TTS_PACK_KEY to the same secret on both machines to ship compiled code"


@dataclass(frozen=True)
class Pack:
    """What one tuning leaves behind.

    Attributes:
        key: Hex digest of what it is for: model structure, weights, torch, device, options.
        decisions: What was kept, and its figures: anything that JSON can say, with texts as keys.
        artifacts: The compiler's artifacts, opaque; `None` where there are none, or none that can be trusted.
    """

    key: str
    decisions: Mapping[str, Any]
    artifacts: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PackInfo:
    """A pack in the folder: its key, its file's size, and when it was last written or read (seconds since 1970)."""

    key: str
    bytes: int
    used: float


class _BadFileError(OSError):
    """A file is not what it should be. It is an OSError, for both have the same end: an event, and no pack."""


class PackStore:
    """Warm packs in one folder, shared by any number of threads and processes.

    A folder that cannot be read or written, and a file that is damaged or not ours, cost a `PackIgnored` event and
    never an exception.

    Args:
        folder: Where the packs lie. The first write makes it, with mode 0700.
        limit_bytes: What all packs together may take; the least recently used go first.
        secret: What packs are signed with. Without one (or an empty one), a random one is kept in the folder.
    """

    def __init__(self, folder: Path, limit_bytes: int, secret: bytes | None = None) -> None:
        self._folder = Path(folder)
        self._limit = limit_bytes
        self._given = secret or None

    def read(self, key: str) -> Pack | None:
        """The pack of this key, or `None`; its artifacts are `None` unless its signature is right.

        Raises:
            PackError: `key` is not 16 to 128 lower-case hex digits.
        """
        path = self._path(key)
        try:
            with _regular(path) as file:
                pack, authentic, _ = _unpack(self._content(file), key, self._known_secret())
                # By its descriptor where possible: the path may have become another file by now.
                _touch(file.fileno() if os.utime in os.supports_fd else path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _ignored(key, error)
            return None
        if not authentic:
            _unverified(key)
        return pack

    def write(self, pack: Pack) -> bool:
        """Keep a pack, in place of an older one of its key; returns whether it is kept.

        Raises:
            PackError: The key is none, or JSON cannot say the decisions (NaN and infinities, too).
        """
        self._path(pack.key)
        try:
            text = json.dumps(dict(pack.decisions), allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise PackError(f"the decisions of warm pack {pack.key[:12]} cannot be said in JSON: {error}") from error
        try:
            secret = self._known_secret() or self._new_secret()
        except OSError as error:
            _ignored(pack.key, f"it could not be kept: {error}")
            return False
        return self._store(pack.key, *_sealed(pack.key, text, pack.artifacts, secret))

    def entries(self) -> list[PackInfo]:
        """The packs in the folder, the most recently used first. Their content is not looked at."""
        try:
            return [PackInfo(key, size, used / 1e9) for used, key, size in reversed(self._scan())]
        except OSError as error:
            emit(PackIgnored(f"the warm pack folder {self._folder}", str(error)))
            return []

    def clear(self) -> int:
        """Remove every pack, and return how many; the secret stays.

        Raises:
            PackError: One cannot be removed.
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
        """Write packs (all if `keys` is `None`), signed as they are, into one file that can be shipped.

        Returns:
            How many packs it holds. A damaged pack costs an event and is not among them.

        Raises:
            PackError: There is no pack of such a key, or the file cannot be written.
        """
        # The most recently used comes last, so that it is the most recently used where the file is loaded, too.
        wanted = [info.key for info in reversed(self.entries())] if keys is None else list(dict.fromkeys(keys))
        count = 0

        def parts() -> Generator[bytes, None, None]:  # one pack in memory at a time
            nonlocal count
            yield _EXPORT_MAGIC
            for key in wanted:
                try:
                    with _regular(self._path(key)) as file:
                        content = self._content(file)
                    _unpack(content, key, None)
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
            with _temporary(Path(path).parent, parts()) as made:
                made.replace(path)
        except OSError as error:
            raise PackError(f"{path} cannot be written: {error}") from error
        return count

    def load(self, path: Path) -> int:
        """Take the packs of an exported file into this folder; returns how many. Each other one costs an event.

        One that is not signed with this folder's secret is taken without artifacts and stays unsigned. It does not
        replace one of its key that is signed.

        Raises:
            PackError: The file cannot be read, or is no export of this format version.
        """
        count = 0
        try:
            secret = self._known_secret()
            with _regular(Path(path), follow=True) as file:
                if file.readline(_LINE_LIMIT) != _EXPORT_MAGIC:
                    raise PackError(f"{path} is no export of warm packs, or one of another format version")
                while entry := _EXPORT_ENTRY.fullmatch(line := file.readline(_LINE_LIMIT)):
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
            _, authentic, text = _unpack(content, key, secret)
        except OSError as error:
            _ignored(key, error)
            return False
        if authentic:
            return self._store(key, content)
        with suppress(OSError), _regular(self._path(key)) as file:
            _, known, _ = _unpack(self._content(file), key, secret)
            if known:
                _ignored(key, f"it is signed with another secret, unlike the one that is here; {_SHARE}")
                return False
        _unverified(key)
        # Unsigned: our own signature would vouch for what nobody has verified.
        return self._store(key, *_sealed(key, text, None, None))

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(str(key)):  # it becomes a file name
            raise PackError(f"key={key!r} must be 16 to 128 lower-case hex digits")
        return self._folder / f"{key}.pack"

    def _content(self, file: IO[bytes]) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if size > self._limit:
            raise _BadFileError(f"its {size} bytes are more than the limit of {self._limit}")
        return file.read(size)

    def _scan(self) -> list[tuple[int, str, int]]:
        """The packs as (mtime in ns, key, bytes), the least recently used first."""
        found: list[tuple[int, str, int]] = []
        with suppress(FileNotFoundError):  # no folder yet
            for path in self._folder.iterdir():
                if path.suffix == ".pack" and _KEY.fullmatch(path.stem):
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        about = path.lstat()
                        if stat.S_ISREG(about.st_mode):
                            found.append((about.st_mtime_ns, path.stem, about.st_size))
        return sorted(found)

    def _store(self, key: str, *parts: bytes) -> bool:
        try:
            if (size := sum(map(len, parts))) > self._limit:
                raise _BadFileError(f"its {size} bytes are more than the limit of {self._limit}")
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _temporary(self._folder, parts) as made:
                _touch(made)
                made.replace(self._path(key))
        except OSError as error:
            _ignored(key, f"it could not be kept: {error}")
            return False
        try:
            self._tidy(key)
        except OSError as error:  # on Windows, somebody reads the oldest one; the next write tries again
            emit(PackIgnored(f"the limit of the warm pack folder {self._folder}", str(error)))
        return True

    def _tidy(self, written: str) -> None:
        """Evict the least recently used packs but the one just written, and drop what crashed writers left."""
        packs = self._scan()
        excess = sum(size for _, _, size in packs) - self._limit
        for _, key, size in packs:
            if excess > 0 and key != written:
                self._path(key).unlink(missing_ok=True)
                excess -= size
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.name.startswith(_TEMPORARY) and time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _known_secret(self) -> bytes | None:
        if self._given is not None:
            return self._given
        path = self._folder / "secret"
        try:
            return _read_secret(path)
        except _BadFileError as error:
            emit(PackIgnored(f"the secret {path}", f"{error}; the next pack that is written gets a fresh one"))
            return None

    def _new_secret(self) -> bytes:
        """Make the folder's secret, or take the one that another process has made meanwhile."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / "secret"
        with _alone(self._folder):
            try:
                found = _read_secret(path)
            except _BadFileError:
                path.unlink()
                found = None
            if found is not None:
                return found
            fresh = secrets.token_bytes(_SECRET_BYTES)
            # It gets its name when it is whole, and only if nobody has the name: that holds without the lock, too.
            with _temporary(self._folder, [fresh]) as made:
                try:
                    os.link(made, path)
                except FileExistsError:
                    found = _read_secret(path)
                except OSError:  # a file system without hard links
                    made.rename(path)
            return found or fresh


def _ignored(key: str, reason: object) -> None:
    emit(PackIgnored(f"warm pack {key[:12]}", str(reason)))


def _unverified(key: str) -> None:
    emit(PackIgnored(f"the compiled code of warm pack {key[:12]}", f"it is signed with another secret; {_SHARE}"))


@contextmanager
def _regular(path: Path, *, follow: bool = False, private: bool = False) -> Generator[IO[bytes], None, None]:
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
        raise _BadFileError("it is no regular file")
    user = getattr(os, "geteuid", None)
    if not private or user is None:  # on Windows, the folder's own rights keep others out
        return
    if about.st_uid != user():
        raise _BadFileError(f"it belongs to user {about.st_uid}")
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o477 != 0o400:  # noqa: PLR2004 - readable by the owner, and nothing for anybody else
        raise _BadFileError(f"its mode is {mode:04o} and must be 0600")


def _read_secret(path: Path) -> bytes | None:
    """The secret in this file, `None` if there is no file; `_BadFileError` if others may know it or have set it."""
    try:
        with _regular(path, private=True) as file:
            found = file.read(_SECRET_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(found) != _SECRET_BYTES:
        raise _BadFileError(f"it does not hold {_SECRET_BYTES} bytes")
    return found


@contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Hold the folder's lock, where the platform and its file system have one: two must not replace one secret."""
    if sys.platform == "win32":  # pragma: no cover
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
def _temporary(folder: Path, parts: Iterable[bytes]) -> Generator[Path, None, None]:
    """Write a file (mode 0600) that is on disk when its path is given, and gone afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
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


def _touch(target: Path | int) -> None:
    # An explicit time: the kernel's own stamp is some milliseconds coarse, which would blur who was used last.
    with suppress(OSError):
        now = time.time_ns()
        os.utime(target, ns=(now, now))


def _sealed(key: str, text: bytes, artifacts: bytes | None, secret: bytes | None) -> tuple[bytes, bytes]:
    """A pack's file and its signature; unsigned where there is no secret."""
    header: dict[str, Any] = {"key": key}
    for name, section in (("decisions", text), ("artifacts", artifacts)):
        header[name] = None if section is None else [len(section), hashlib.sha256(section).hexdigest()]
    body = b"".join([_MAGIC, json.dumps(header).encode(), b"\n", text, artifacts or b""])
    return body, _UNSIGNED if secret is None else _mac(secret, body)


def _mac(secret: bytes, body: bytes | memoryview) -> bytes:
    return hmac.new(secret, body, hashlib.sha256).digest()


def _unpack(content: bytes, key: str, secret: bytes | None) -> tuple[Pack, bool, bytes]:
    """Check all of a pack's file; returns the pack, whether its signature is by `secret`, and the decisions' text."""
    if not content.startswith(_MAGIC):
        raise _BadFileError("it is no warm pack, or one of another format version")
    end = content.find(b"\n", len(_MAGIC), len(_MAGIC) + _LINE_LIMIT)
    body = len(content) - len(_UNSIGNED)
    if not 0 <= end < body:
        raise _BadFileError("it has no header: it is damaged or cut short")
    header = _from_json(content[len(_MAGIC) : end])
    if header.get("key") != key:
        raise _BadFileError("it is for another key")
    view, start = memoryview(content), end + 1
    sections: list[bytes] = []
    for name in ("decisions", "artifacts"):
        match header.get(name):
            case None if name == "artifacts":
                pass
            case [int(size), str(digest)] if 0 <= size <= body - start:
                sections.append(bytes(view[start : start + size]))
                start += size
                if hashlib.sha256(sections[-1]).hexdigest() != digest:
                    raise _BadFileError(f"the checksum of its {name} is wrong: it is damaged")
            case _:
                raise _BadFileError("its header claims what the file does not hold: it is damaged or cut short")
    if start != body:
        raise _BadFileError("it is longer than its header claims: it is damaged")
    authentic = secret is not None and hmac.compare_digest(_mac(secret, view[:body]), view[body:])
    text, *artifacts = sections
    return Pack(key, _from_json(text), artifacts[0] if authentic and artifacts else None), authentic, text


def _from_json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _BadFileError(f"its JSON cannot be read: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise _BadFileError("its JSON is no object")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value
