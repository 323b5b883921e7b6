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
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from accelerate_tts.errors import described
from accelerate_tts.events import PackIgnored, emit
from accelerate_tts.storage.files import BadFileError, regular
from accelerate_tts.storage.lru_folder import LruFolder
from accelerate_tts.voices.memory import StoredEmbedding

_MAGIC = b"accelerate-tts embedding 3\n"
_LINE = 128  # maximum bytes of each line of the header
_DESCRIPTION_SHARE, _LEAST_DESCRIPTION, _MOST_DESCRIPTION = 32, 1 << 12, 1 << 20

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_KEYS = {type(None), bool, int, float, str, bytes}  # hashing keys of other classes runs their code
_ARRAYS = re.compile(r"[<>|]([fiuc][0-9]{1,2}|b1)")
_DEVICES = re.compile(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?")


class EmbeddingFiles:
    """A folder of embeddings, readable by its owner only, for any number of threads and processes.

    Files that cannot be read or written cause an event, not an exception.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._files = LruFolder(folder, ".embedding", limit_bytes, "the folder of embeddings")
        # In memory, a description of empty lists takes some thirty times its length.
        self._failure: int | None = None  # `errno` of the last write: a full disk is said once, not for each voice
        self._most = max(_LEAST_DESCRIPTION, min(limit_bytes // _DESCRIPTION_SHARE, _MOST_DESCRIPTION))

    def read(
        self, key: str, packages: Collection[str] = (), fits: Callable[[Any], bool] = lambda _: True
    ) -> StoredEmbedding | None:
        """Read the embedding of a key; return `None` if there is none, or with an event if the file is unusable.

        Args:
            key: The key that it was written under.
            packages: Packages whose dataclasses may be in it, if they are imported already.
            fits: Checks that a value is one that the caller writes.
        """
        path = self._files.path(key)
        try:
            with regular(path) as file:
                value = _unpacked(key, self._files.content(file), packages, self._most)
                if not fits(value):
                    raise BadFileError("it holds something else than an answer of this function")  # noqa: TRY301
                kept = StoredEmbedding(value)
                self._files.used(key, file)
        except FileNotFoundError:
            return None
        except Exception as error:  # a file that any program may have written
            emit(PackIgnored(f"embedding {key[:12]}", described(error, 200)))
            return None
        return kept

    def write(self, key: str, kept: StoredEmbedding, packages: Collection[str] = ()) -> bool:
        """Write an embedding, replacing an older one of the same key.

        Args:
            key: Its name, 16 to 128 lower-case hexadecimal digits.
            kept: The embedding.
            packages: Packages whose dataclasses may be in it.

        Returns:
            True if the file was written; False if it is too large or the folder is not writable. An event says so, but
            one alone for as long as all writes fail for the same reason.

        Raises:
            TypeError, ValueError: It holds other values than tensors, arrays, plain values, lists, tuples, dicts and
                such dataclasses, or too many of them.
        """
        parts = _packed(key, kept.copy(), packages, self._most)
        try:
            self._files.write(key, *parts)
        except OSError as error:
            if error.errno is None or error.errno != self._failure:
                emit(PackIgnored(f"embedding {key[:12]}", f"it could not be kept: {error}"))
            self._failure = error.errno
            return False
        self._failure = None
        return True


def _packed(key: str, value: Any, packages: Collection[str], most: int) -> list[bytes]:
    blobs: list[bytes] = []
    description = json.dumps(_said(value, packages, blobs), allow_nan=False, separators=(",", ":")).encode()
    if len(description) > most:
        raise ValueError(f"it holds too many values to be stored: they take {len(description)} bytes to describe")
    rest = [b"%d\n" % len(description), description, *blobs]
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
