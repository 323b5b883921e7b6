"""Embeddings on disk, for the next process: tensors, arrays and plain values, in files that cannot execute code.

A file has a line with the format version, a line with the SHA-256 of the key and the rest, and a line with the length
of the description. Then come the description (JSON, nested lists that begin with the name of a type) and the raw bytes
of tensors, arrays and texts. Nothing is compressed and every length is stated, so a value is not larger than its file.
Dataclasses of packages that the caller names are written field by field, and restored without running their code. Other
values would need a pickle, which runs code, so they are not written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from accelerate_tts.errors import message_of
from accelerate_tts.events import PackIgnored, emit
from accelerate_tts.locks import lock
from accelerate_tts.storage.files import TEMPORARY, regular, temporary, touch
from accelerate_tts.voices.memory import Kept

if TYPE_CHECKING:
    import torch

__all__ = ["EmbeddingFiles"]

_MAGIC = b"accelerate-tts embedding 3\n"
_SUFFIX = ".embedding"
_KEY = re.compile(r"[0-9a-f]{16,128}")
_LINE = 128  # maximum bytes of each line of the header
# In memory, a description of empty lists takes some thirty times its length.
_DESCRIPTION_SHARE, _LEAST_DESCRIPTION, _MOST_DESCRIPTION = 32, 1 << 12, 1 << 20
_LEFTOVER_SECONDS = 3600.0  # no write takes an hour: the process that made an older temporary file is gone
_MANY = 256  # maximum files of a folder that is scanned after each write; the scan takes negligible time
_SLACK = 16  # with more files, a sixteenth of them may be written between two scans

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_KEYS = {type(None), bool, int, float, str, bytes}  # hashing keys of other classes runs their code
_ARRAYS = re.compile(r"[<>|]([fiuc][0-9]{1,2}|b1)")
_DEVICES = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?")


class EmbeddingFiles:
    """A folder of embeddings, readable by its owner only, for any number of threads and processes.

    Files that cannot be read or written cause an event, not an exception. The folder is scanned after a write. With
    more than 256 files it is scanned after as many writes as a sixteenth of them, so a process may exceed the limit by
    that much in between. The folder's own modification time is the time of the last use of a file.

    Args:
        folder: Created at the first write, with mode 0700; its files have mode 0600.
        limit_bytes: Maximum bytes of all files. The least recently used are evicted first.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._lock = lock()
        self._room = self._writes = 0  # bytes and files that may be written before the next scan

    def read(
        self, key: str, packages: Collection[str] = (), fits: Callable[[Any], bool] = lambda _: True
    ) -> Kept | None:
        """Read the embedding of a key; return `None` if there is none, or with an event if the file is unusable.

        Args:
            key: The key that it was written under.
            packages: Packages whose dataclasses may be in it, if they are imported already.
            fits: Checks that a value is one that the caller writes.
        """
        path = self._path(key)
        try:
            with regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                refused = _too_large(size, self._limit) if size > self._limit else None
                value = None if refused else _unpacked(key, file.read(size), packages, self._most_described())
            if not refused and not fits(value):
                refused = "it holds something else than an answer of this function"
            kept = None if refused else Kept(value)
        except FileNotFoundError:
            return None
        except Exception as error:  # a file that any program may have written
            emit(PackIgnored(f"embedding {key[:12]}", f"{type(error).__name__}: {message_of(error)}"))
            return None
        if refused:
            emit(PackIgnored(f"embedding {key[:12]}", refused))
        else:
            self._used(path)
        return kept

    def write(self, key: str, kept: Kept, packages: Collection[str] = ()) -> bool:
        """Write an embedding, replacing an older one of the same key.

        Args:
            key: Its name, 16 to 128 lower-case hexadecimal digits.
            kept: The embedding.
            packages: Packages whose dataclasses may be in it.

        Returns:
            True if the file was written; False with an event if it is too large or the folder is not writable.

        Raises:
            TypeError, ValueError: It holds other values than tensors, arrays, plain values, lists, tuples, dicts and
                such dataclasses, or too many of them.
        """
        path = self._path(key)
        parts = _packed(key, kept.copy(), packages, self._most_described())
        size = sum(map(len, parts))
        if size > self._limit:
            emit(PackIgnored(f"embedding {key[:12]}", _too_large(size, self._limit)))
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            last = self._last_use()
            with temporary(self._folder, parts) as made:
                touch(made, last)
                made.replace(path)
            touch(self._folder, last)
            with self._lock:
                self._room -= size
                self._writes -= 1
                due = self._room < 0 or self._writes < 0
            if due:
                self._tidy()
        except OSError as error:
            emit(PackIgnored(f"the folder of embeddings {self._folder}", str(error)))
            return False
        return True

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):  # the key becomes a file name
            raise ValueError(f"key={key!r} must be 16 to 128 lower-case hex digits")
        return self._folder / f"{key}{_SUFFIX}"

    def _most_described(self) -> int:
        return max(_LEAST_DESCRIPTION, min(self._limit // _DESCRIPTION_SHARE, _MOST_DESCRIPTION))

    def _last_use(self) -> int:
        try:
            return self._folder.stat().st_mtime_ns
        except OSError:  # only the order of eviction suffers
            return 0

    def _used(self, path: Path) -> None:
        """Mark a file as the most recently used, also after the clock was set back."""
        last = self._last_use()
        touch(path, last)
        touch(self._folder, last)

    def _tidy(self) -> None:
        """Evict the least recently used files, and delete temporary files of crashed writers."""
        found: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process may evict, too
                    about = entry.stat(follow_symlinks=False)
                    if entry.name.startswith(TEMPORARY):
                        if time.time() - about.st_mtime > _LEFTOVER_SECONDS:
                            Path(entry.path).unlink()
                    elif _is_embedding(entry.name) and stat.S_ISREG(about.st_mode):
                        found.append((about.st_mtime_ns, about.st_size, entry.path))
        found.sort()
        total = sum(size for _, size, _ in found)
        # With many files, some more are evicted than necessary; otherwise the next write would scan again.
        many = len(found) > _MANY
        wanted = self._limit - self._limit // _SLACK if many and total > self._limit else self._limit
        for _, size, path in found:
            if total <= wanted:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        if found:
            touch(self._folder, max(self._last_use(), found[-1][0]))
        with self._lock:
            self._room, self._writes = self._limit - total, len(found) // _SLACK if many else 0


def _too_large(size: int, limit: int) -> str:
    return f"its {size} bytes are more than the limit of {limit}"


def _is_embedding(name: str) -> bool:
    return name.endswith(_SUFFIX) and bool(_KEY.fullmatch(name[: -len(_SUFFIX)]))


def _packed(key: str, value: Any, packages: Collection[str], most: int) -> list[bytes]:
    blobs: list[bytes] = []
    described = json.dumps(_said(value, packages, blobs), allow_nan=False, separators=(",", ":")).encode()
    if len(described) > most:
        raise ValueError(f"it holds too many values to be stored: they take {len(described)} bytes to describe")
    rest = [b"%d\n" % len(described), described, *blobs]
    digest = hashlib.sha256(key.encode())
    for part in rest:
        digest.update(part)
    return [_MAGIC, digest.hexdigest().encode() + b"\n", *rest]


def _unpacked(key: str, content: bytes, packages: Collection[str], most: int) -> Any:
    if not content.startswith(_MAGIC):
        raise ValueError("it is no embedding, or one of another format version")
    start = content.find(b"\n", len(_MAGIC), len(_MAGIC) + _LINE) + 1
    digest = hashlib.sha256(key.encode())
    digest.update(memoryview(content)[start:])
    if not start or digest.hexdigest().encode() != content[len(_MAGIC) : start - 1]:
        raise ValueError("its checksum is wrong: it is damaged or cut short")
    begin = content.find(b"\n", start, start + _LINE) + 1
    length = content[start : begin - 1]
    if not begin or not re.fullmatch(rb"[0-9]{1,9}", length) or not int(length) <= min(most, len(content) - begin):
        raise ValueError("its description is missing, or longer than it may be")
    end = begin + int(length)
    blobs = _Blobs(content, end)
    value = _meant(json.loads(content[begin:end]), packages, blobs)
    if blobs.rest:
        raise ValueError(f"{blobs.rest} bytes of it belong to nothing")
    return value


class _Blobs:
    """The bytes behind a description. Each is taken once, in order."""

    def __init__(self, content: bytes, start: int) -> None:
        self._content = content
        self._next = start

    @property
    def rest(self) -> int:
        return len(self._content) - self._next

    def take(self, size: Any) -> memoryview:
        if type(size) is not int or not 0 <= size <= self.rest:
            raise ValueError("it says that it is longer than it is")
        self._next += size
        return memoryview(self._content)[self._next - size : self._next]


def _said(value: Any, packages: Collection[str], blobs: list[bytes]) -> list[Any]:  # noqa: C901, PLR0911 - a table of types
    """Describe a value by nested lists that begin with the name of its type; append long content to the blobs."""
    import torch

    kind = type(value)
    if value is None or kind is bool:
        return ["plain", value]
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", value.hex()]
    if kind is str or kind is bytes:
        blobs.append(value.encode("utf-8", "surrogatepass") if kind is str else value)
        return [kind.__name__, len(blobs[-1])]
    if kind in {list, tuple}:
        return [kind.__name__, *(_said(item, packages, blobs) for item in value)]
    if kind is dict:
        if not {type(name) for name in value} <= _KEYS:
            raise TypeError("a dict with keys that are no plain values cannot be stored")
        pairs = ([_said(name, packages, blobs), _said(item, packages, blobs)] for name, item in value.items())
        return ["dict", *pairs]
    if kind is torch.Tensor:
        return _tensor_said(value, blobs)
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray and _ARRAYS.fullmatch(value.dtype.str):
        blobs.append(value.tobytes())
        return ["array", value.dtype.str, list(value.shape), len(blobs[-1])]
    where = (kind.__module__, kind.__qualname__)
    if _dataclass(*where, packages) is kind:
        held: dict[str, Any] = getattr(value, "__dict__", {})  # classes with slots are not supported
        if held.keys() == _fields(kind):
            return ["fields", *where, *([name, _said(item, packages, blobs)] for name, item in held.items())]
    raise TypeError(f"a {'.'.join(where)} cannot be stored without a pickle")


def _tensor_said(tensor: torch.Tensor, blobs: list[bytes]) -> list[Any]:
    import torch

    name, device = str(tensor.dtype).removeprefix("torch."), str(tensor.device)
    if name not in _DTYPES or tensor.layout is not torch.strided or not _DEVICES.fullmatch(device):
        raise TypeError(f"a {tensor.layout} tensor of {tensor.dtype} on {device} cannot be stored")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    blobs.append(ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b"")
    return ["tensor", name, list(tensor.shape), device, len(blobs[-1])]


def _meant(said: Any, packages: Collection[str], blobs: _Blobs) -> Any:  # noqa: C901, PLR0911 - a table of kinds
    kind, *rest = said
    if kind == "plain" and (rest[0] is None or type(rest[0]) is bool):
        return rest[0]
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "str":
        return bytes(blobs.take(rest[0])).decode("utf-8", "surrogatepass")
    if kind == "bytes":
        return bytes(blobs.take(rest[0]))
    if kind in {"list", "tuple"}:
        items = [_meant(item, packages, blobs) for item in rest]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        made = {_meant(name, packages, blobs): _meant(item, packages, blobs) for name, item in rest}
        if not {type(name) for name in made} <= _KEYS:
            raise ValueError("it holds a dict with keys that are no plain values")
        return made
    if kind == "tensor":
        return _tensor_meant(*rest, blobs=blobs)
    if kind == "array":
        return _array_meant(*rest, blobs=blobs)
    if kind == "fields":
        module, name, *pairs = rest
        return _made(module, name, {field: _meant(item, packages, blobs) for field, item in pairs}, packages)
    raise ValueError(f"it names a kind of value that there is not: {kind!r:.40}")


def _tensor_meant(name: str, shape: list[int], device: str, size: int, *, blobs: _Blobs) -> torch.Tensor:
    import torch

    if name not in _DTYPES or not _DEVICES.fullmatch(device):
        raise ValueError(f"it names a dtype or a device that is not stored: {name!r:.40}, {device!r:.40}")
    dtype: torch.dtype = getattr(torch, name)
    content = _checked(shape, size, dtype.itemsize, blobs)
    with torch.inference_mode(mode=False), torch.no_grad():
        # A bool with another byte than 0 and 1 would break computations.
        read = torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        made = read.ne(0) if dtype is torch.bool else read.view(dtype)
        return made.reshape(shape).to(device)


def _array_meant(dtype: str, shape: list[int], size: int, *, blobs: _Blobs) -> Any:
    numpy: Any = sys.modules.get("numpy")  # torch has imported it if it is installed
    if numpy is None or not _ARRAYS.fullmatch(dtype):
        raise ValueError(f"it names a dtype that is not stored, or there is no numpy: {dtype!r:.40}")
    kind = numpy.dtype(dtype)
    read = numpy.frombuffer(bytearray(_checked(shape, size, kind.itemsize, blobs)), dtype="u1")
    return (read != 0 if kind.kind == "b" else read.view(kind)).reshape(shape)


def _checked(shape: Any, size: Any, item: int, blobs: _Blobs) -> memoryview:
    """Take the bytes of a tensor or an array, and check their number against its shape."""
    if type(shape) is not list or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("it names a shape that is none")
    if math.prod(shape) * item != size:
        raise ValueError(f"it names a shape of {math.prod(shape)} elements for {size!r:.40} bytes")
    return blobs.take(size)


_COPYING = {
    "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__",
    "__getnewargs_ex__", "__new__", "__del__", "__getattribute__",
}  # fmt: skip


def _made(module: str, name: str, fields: dict[str, Any], packages: Collection[str]) -> Any:
    """Restore a dataclass without calling its `__init__` or `__post_init__`."""
    cls = _dataclass(module, name, packages)
    if cls is None or fields.keys() != _fields(cls):
        raise ValueError(f"{module}.{name} is no dataclass of {', '.join(packages)} with these fields")
    made: Any = object.__new__(cls)
    vars(made).update(fields)
    return made


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _dataclass(module: str, name: str, packages: Collection[str]) -> type | None:
    """Return the dataclass of that name in an allowed package; `None` without one. Imports nothing."""
    if module.partition(".")[0] not in packages:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        return None
    cls: type = found
    # A class with copy methods of its own would run them on content from a file.
    says = {name for base in cls.__mro__[:-1] for name in vars(base)} & _COPYING
    return cls if not says and (cls.__module__, cls.__qualname__) == (module, name) else None
